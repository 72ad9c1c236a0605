"""Delivers results to the platform: how often each is sent, the pauses in between, and what is logged.

The SDK (1.12.0) tries three times within four seconds, and only after server errors. If the connection breaks, or the
platform answers 429, the result is lost, and with it a picture that was paid for.
"""

import asyncio
import json
import random
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp
import runpod
from runpod.serverless.modules import rp_http
from yarl import URL

log = runpod.RunPodLogger()

CONNECT_TIMEOUT = 10  # seconds
SILENCE_TIMEOUT = 30  # seconds that a connection may stay silent


@dataclass(frozen=True)
class Timing:
    """How long the worker waits for the platform, in seconds."""

    first_pause: float = 0.25  # after a failed try; doubles with each one that follows
    max_pause: float = 25.0
    shutdown_pause: float = 1.0  # the longest during shutdown, when the platform may kill the process at any time
    line_interval: float = 60.0  # between two log lines about the same outage
    give_up: float = 600.0  # results are retried for RunPod's default execution timeout, after which the job has ended
    transfer_timeout: float = 120.0  # for sending a result, or reading an answer: enough for 10 MB at 0.1 MB/s
    poll_timeout: float = 90.0  # until a long poll is answered: the SDK's own limit
    poll_interval: float = 0.2  # the shortest time from one long poll to the next if the first brought no jobs
    early_stop: float = 60.0  # a stop signal that arrives before its job is remembered


class Rejected(Exception):
    """A status that the platform sent. aiohttp's errors have one too, such as 400 for an answer that is not HTTP."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        super().__init__(f"the platform answered {response.status}, {response.reason}")
        self.is_final = 400 <= response.status < 500 and response.status not in (408, 425, 429)


class Outage:
    """Tracks consecutive failures of one kind of request: how long to wait before the next try, and what to log.

    It logs one line at the first failure, at most one a minute from then on, and one at the next success.
    """

    def __init__(self, what: str, timing: Timing, job_id: str | None = None) -> None:
        self._what = what
        self._timing = timing
        self._job_id = job_id
        self._pause = self._began = self._logged = 0.0

    def failed(self, error: Exception) -> float:
        """Returns the seconds to wait: exponential backoff, shortened at random by up to half."""
        now = time.monotonic()
        if not self._pause:
            self._began = self._logged = now
            log.warn(f"cannot {self._what}, trying again: {_reason(error)}", self._job_id)
        elif now - self._logged > self._timing.line_interval:
            self._logged = now
            seconds = f"{now - self._began:.0f} s"
            log.warn(f"has been unable to {self._what} for {seconds}: {_reason(error)}", self._job_id)
        self._pause = min(self._pause * 2 or self._timing.first_pause, self._timing.max_pause)
        return self._pause * random.uniform(0.5, 1)

    def succeeded(self) -> None:
        if self._pause:
            log.info(f"can {self._what} again, after {time.monotonic() - self._began:.1f} s", self._job_id)
        self._pause = 0.0


async def deliver(
    session: aiohttp.ClientSession, job_id: str, result: dict[str, Any], shutting_down: asyncio.Event, timing: Timing
) -> None:
    """Sends ``result`` until the platform accepts or refuses it, or ``timing.give_up`` has passed.

    If only the platform's answer is lost, the platform receives the result twice.
    """
    body = json.dumps(result).encode()
    sending = Outage("send the result", timing, job_id)
    give_up = time.monotonic() + timing.give_up
    while True:
        try:
            await post(session, job_id, body, timing.transfer_timeout)
            break
        except Exception as error:
            if (isinstance(error, Rejected) and error.is_final) or time.monotonic() > give_up:
                log.error(f"the result is lost: {_reason(error)}", job_id)
                return
            pause = sending.failed(error)
        if shutting_down.is_set():
            await asyncio.sleep(min(pause, timing.shutdown_pause))
        else:
            with suppress(TimeoutError):
                await asyncio.wait_for(shutting_down.wait(), pause)
    sending.succeeded()
    log.info("Finished.", job_id)


async def post(session: aiohttp.ClientSession, job_id: str, body: bytes, timeout: float) -> None:
    """Sends a job's result or progress; raises unless the platform accepts it within ``timeout`` seconds."""
    # as an id, "." and ".." would be taken for steps in the path
    quoted_id = quote(job_id, safe="").replace(".", "%2E")
    address = URL(f"{rp_http.JOB_DONE_URL}&isStream=false")
    url = URL(str(address).replace("$ID", quoted_id), encoded=True)
    headers = {"Content-Type": "application/x-www-form-urlencoded", "charset": "utf-8", "X-Request-ID": quoted_id}
    limits = aiohttp.ClientTimeout(timeout, sock_connect=CONNECT_TIMEOUT, sock_read=SILENCE_TIMEOUT)
    async with session.post(url, data=body, headers=headers, timeout=limits, allow_redirects=False) as response:
        if not 200 <= response.status < 300:
            raise Rejected(response)


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientResponseError):
        # the full text includes the URL with the platform's parameters
        return f"unreadable answer: {error.message.strip()}".splitlines()[0].rstrip(":")
    return str(error) or type(error).__name__
