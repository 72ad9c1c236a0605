"""Reads the platform's answer to job-take.

One client's input must not cost another client a job. ``json.loads`` reads all of an answer or nothing, and so do
pydantic_core, orjson and msgspec. Here a number that Python cannot hold becomes infinity, and what is not valid Unicode
a lone surrogate: no field of a request accepts either. An answer with a part that is nested more deeply than Python's
stack is cut into its jobs, and each is read alone.
"""

import asyncio
import json
import math
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
import runpod

log = runpod.RunPodLogger()

MAX_JOBS = 8
"""How many jobs the worker asks for at once."""
MAX_ANSWER_BYTES = MAX_JOBS * 20 * 2**20
"""The longest answer that the worker reads. RunPod's limit for one job's request is 20 MB."""
LARGE = 2**20
"""From how many bytes on an answer is read in a thread."""


@dataclass(frozen=True)
class Job:
    """A job as the platform sent it, or what is wrong with a part of it that cannot be read."""

    id: str
    fields: dict[str, Any]
    fault: str | None = None


async def read_body(response: aiohttp.ClientResponse, seconds: float) -> bytearray:
    """Returns the body of an answer, or as much as came within ``seconds``: it may hold whole jobs.

    Raises:
        ValueError: if it has more than MAX_ANSWER_BYTES, decompressed.
    """
    body = bytearray()
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > MAX_ANSWER_BYTES:
                    raise ValueError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
    return body


async def read_jobs(body: bytearray) -> list[Job]:
    """Returns the jobs of an answer, which is one job, or several in a list; ``null`` holds none.

    Raises:
        ValueError: if the answer is not empty but holds no job.
    """
    jobs = await asyncio.to_thread(_read, body) if len(body) >= LARGE else _read(body)
    found = [job for job in jobs if job]
    if jobs and not found:
        raise ValueError("the answer holds no job")
    if len(found) < len(jobs):
        log.warn(f"{len(jobs) - len(found)} of {len(jobs)} jobs dropped: malformed, or without an id")
    return found


def _read(body: bytearray) -> list[Job | None]:
    encoding = json.detect_encoding(body)
    text = body.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "surrogatepass").strip()
    try:
        answer = _DECODER.decode(text)
    except RecursionError:
        return [_read_job(part) for part in (_split(text) if text.startswith("[") else [text])]
    return [_job(each) for each in (answer if isinstance(answer, list) else [answer]) if answer is not None]


def _read_job(text: str) -> Job | None:
    fields, fault = dict[str, Any](), None
    try:
        for member in _split(text.strip()):
            try:
                fields |= _DECODER.decode(f"{{{member}}}")
            except RecursionError:
                fault = "nested too deeply"
    except ValueError:
        return None
    return _job(fields, fault)


def _job(fields: Any, fault: str | None = None) -> Job | None:
    job_id = fields.get("id") if isinstance(fields, dict) else None
    if not (isinstance(job_id, str) and job_id):
        return None
    try:
        job_id.encode()
    except UnicodeEncodeError:
        # no result could be sent for such an id
        return None
    return Job(job_id, fields, fault)


def _integer(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:
        # more than 4,300 digits
        return math.inf


_DECODER = json.JSONDecoder(parse_int=_integer)

_TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"|[\[{]+|[\]}]+|[,"]', re.DOTALL)
"""What structures JSON: strings as a whole, runs of brackets, commas, and quotes that begin no string."""


def _split(text: str) -> list[str]:
    """Cuts the text of a JSON array or object, which is not empty, into its elements or members.

    Raises:
        ValueError: if brackets or quotes do not match.
    """
    parts, begin, depth = list[str](), 1, 0
    for token in _TOKEN.finditer(text, begin):
        kind = token[0][0]
        if kind in "[{":
            depth += len(token[0])
        elif kind in "]}":
            depth -= len(token[0])
        elif kind == "," and not depth:
            parts.append(text[begin : token.start()])
            begin = token.end()
        elif token[0] == '"':
            raise ValueError("a string does not end")
    if depth != -1:
        raise ValueError("brackets do not match")
    return [*parts, text[begin:-1]]
