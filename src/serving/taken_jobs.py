"""Reads the platform's answer to job-take.

One client's input must not cost another client a job. ``json.loads`` reads all of an answer or nothing, and so do
pydantic_core, orjson and msgspec: it fails where one input is nested more deeply than Python's stack, has an integer of
more than 4,300 digits, or is not valid UTF-8. Such an answer is cut into its jobs, and each is read alone.
"""

import asyncio
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
import runpod

log = runpod.RunPodLogger()

MAX_ANSWER_BYTES = 64 * 2**20
"""The longest answer that the worker reads. RunPod's limit for one job's request is 20 MB."""


@dataclass(frozen=True)
class Job:
    """A job as the platform sent it, or what is wrong with a part of it that cannot be read."""

    id: str
    fields: dict[str, Any]
    fault: str | None = None


class _Unreadable(Exception):
    """The JSON may be well-formed, but this process cannot read it."""


async def read_body(response: aiohttp.ClientResponse) -> bytes:
    """Returns the body of an answer, or as much as came before the request's time-out: it may hold whole jobs.

    Raises:
        ValueError: if it has more than MAX_ANSWER_BYTES, decompressed.
    """
    body = bytearray()
    with suppress(TimeoutError):
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > MAX_ANSWER_BYTES:
                raise ValueError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
    return bytes(body)


async def read_jobs(body: bytes) -> list[Job]:
    """Returns the jobs of an answer, which is one job, or several in a list; ``null`` holds none.

    Raises:
        ValueError: if the answer is not empty but holds no job.
    """
    try:
        answer = json.loads(body)
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError):
        # in a thread, because hostile input can take seconds
        jobs = await asyncio.to_thread(_read_alone, body)
    else:
        jobs = [_job(each) for each in (answer if isinstance(answer, list) else [answer]) if answer is not None]
    found = [job for job in jobs if job]
    if jobs and not found:
        raise ValueError("the answer holds no job")
    if len(found) < len(jobs):
        log.warn(f"{len(jobs) - len(found)} of {len(jobs)} jobs dropped: malformed, or without an id")
    return found


def _read_alone(body: bytes) -> list[Job | None]:
    # bytes that are not UTF-8 become surrogates, which cannot be encoded
    text = body.decode("utf-8", "surrogateescape").strip()
    return [_read_job(part) for part in (_split(text) if text.startswith("[") else [text])]


def _read_job(text: str) -> Job | None:
    try:
        return _job(_load(text))
    except _Unreadable:
        pass
    except ValueError:
        return None
    fields, fault = dict[str, Any](), None
    for member in _split(text):
        try:
            fields |= _load(f"{{{member}}}")
        except _Unreadable as unreadable:
            fault = str(unreadable)
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


def _load(text: str) -> Any:
    """Parses JSON.

    Raises:
        _Unreadable: if it is out of this process's bounds, or was not valid UTF-8.
        ValueError: if it is not JSON.
    """
    try:
        text.encode()
        return json.loads(text)
    except RecursionError:
        raise _Unreadable("nested too deeply") from None
    except UnicodeEncodeError:
        raise _Unreadable("not valid UTF-8") from None
    except json.JSONDecodeError:
        raise
    except ValueError:
        raise _Unreadable("a number has too many digits") from None


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
