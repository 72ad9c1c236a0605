"""All that reaches into RunPod's SDK beyond its documented calls: worker loop, heartbeat's log, reports of progress."""

import asyncio
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
import runpod
from runpod.http_client import AsyncClientSession
from runpod.serverless.modules import rp_http, rp_job, rp_ping, rp_scale

from src.settings import on_runpod

SECONDS_BETWEEN_REPORTS = 1.0
REPORT_TIMEOUT_SECONDS = 30.0
"""How long the platform may take to answer a report of progress."""
RESULT_SECONDS = 600.0
"""For how long a result is sent again and again: RunPod's default execution timeout, after which its job has ended."""
RESULT_TIMEOUT = aiohttp.ClientTimeout(total=120, sock_connect=10, sock_read=30)
"""For one try, in seconds. The total lets 10 MB through at 0.1 MB/s."""
POLL_TIMEOUT = aiohttp.ClientTimeout(sock_connect=10)
"""For a request that the platform answers when there is news. The SDK ends it after 90 s."""
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.25, 25.0
PAUSE_WITHOUT_JOBS_SECONDS = 0.2
LAST_PAUSE_SECONDS = 1.0
"""The longest pause once the worker shuts down: nobody knows how long it is let live."""
SECONDS_BETWEEN_LINES = 60.0

log = runpod.RunPodLogger()

Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


def start(handle: Handler, max_concurrency: int) -> None:
    """Hands ``handle`` to the SDK, which returns when a local server stops, and on the platform never.

    Args:
        handle: from a job to its output or its ``error``.
        max_concurrency: how many jobs the worker holds at once.
    """
    rp_scale.JobScaler = WorkerLoop
    rp_ping.log = QuietLog()
    # a line for every request of the heartbeat that is tried again
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    runpod.serverless.start({"handler": handle, "concurrency_modifier": lambda _: max_concurrency})


class Outage:
    """Tries of one kind, while they fail: how long to wait before the next, and what is logged.

    The log gets a line when the first one fails, at most one a minute from then on, and one when one succeeds.
    """

    def __init__(self, what: str, job_id: str | None = None) -> None:
        self._what = what
        self._job_id = job_id
        self._tries = 0
        self._began = self._logged = 0.0

    def failed(self, error: Exception) -> float:
        """Seconds to wait: exponential backoff, less up to half of it at random."""
        now = time.monotonic()
        if not self._tries:
            self._began = self._logged = now
            log.warn(f"cannot {self._what}, trying again: {_reason(error)}", self._job_id)
        elif now - self._logged > SECONDS_BETWEEN_LINES:
            self._logged = now
            log.warn(f"cannot {self._what} for {now - self._began:.0f} s now: {_reason(error)}", self._job_id)
        # bounded, since a float cannot hold every power of two
        pause = min(FIRST_PAUSE_SECONDS * 2.0 ** min(self._tries, 20), MAX_PAUSE_SECONDS)
        self._tries += 1
        return pause * random.uniform(0.5, 1)

    def over(self) -> None:
        if self._tries:
            log.info(f"could {self._what} again after {time.monotonic() - self._began:.1f} s", self._job_id)
        self._tries = 0


class WorkerLoop(rp_scale.JobScaler):  # type: ignore[misc]
    """The SDK's worker loop, which sends results again, keeps cancellations and a batch's good jobs, and logs less."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.jobs_fetcher = self._fetch_jobs
        self.stop_signals_fetcher = self._fetch_stop_signals
        self.jobs_handler = self._handle
        self._taking_jobs = Outage("take jobs")
        self._listening = Outage("listen for cancellations")
        self._started: set[str] = set()
        self._stopped_early: set[str] = set()
        self._shutting_down = asyncio.Event()
        self._exit: asyncio.Task[None] | None = None
        self._fetching: asyncio.Task[Any] | None = None

    async def run(self) -> None:
        """Takes and handles jobs until a signal asks it to shut down.

        After a signal the SDK stops handling jobs at once but goes on asking for them for up to 90 s, and loses what it
        gets.
        """
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(signal_number, self._shut_down, 0)
        await super().run()

    def _shut_down(self, exit_code: int) -> None:
        """Takes no more jobs, delivers the results of those that the worker holds, exits."""
        if not self._exit:
            self._shutting_down.set()
            self._exit = asyncio.create_task(self._exit_when_idle(exit_code))
            if self._fetching:
                self._fetching.cancel()

    async def _exit_when_idle(self, exit_code: int) -> None:
        # the SDK removes a job when its result is delivered
        while self.job_progress.get_job_count():
            await asyncio.sleep(0.1)
        for heartbeat in multiprocessing.active_children():
            heartbeat.terminate()
        sys.stdout.flush()
        # Python's own exit would wait for the engine's thread, which may be in a call that never ends
        os._exit(exit_code)

    async def _fetch_jobs(self, session: aiohttp.ClientSession, wanted: int) -> list[dict[str, Any]]:
        self._fetching = asyncio.current_task()
        try:
            if self._exit:
                await asyncio.sleep(1)
                return []
            return await self._take_jobs(session, wanted)
        except asyncio.CancelledError:
            # raised, it would end the loop
            if not self._exit:
                raise
            return []

    async def _take_jobs(self, session: aiohttp.ClientSession, wanted: int) -> list[dict[str, Any]]:
        """In place of the SDK's ``get_job``, which drops a whole batch for one bad job, and after whose failures the
        SDK asks again at once, with a line in the log each time.
        """
        try:
            answer = await _poll(session, rp_job._job_get_url(wanted))
            offered = answer if isinstance(answer, list) else [] if answer is None else [answer]
            jobs = [job for job in offered if self._accept(job)]
            if offered and not jobs:
                raise ValueError("the answer holds no job")
        except Exception as error:
            await asyncio.sleep(self._taking_jobs.failed(error))
            return []
        self._taking_jobs.over()
        if not jobs:
            await asyncio.sleep(PAUSE_WITHOUT_JOBS_SECONDS)
        if len(jobs) < len(offered):
            log.warn(f"{len(offered) - len(jobs)} of {len(offered)} jobs dropped: malformed, or without an id")
        return jobs

    def _accept(self, job: Any) -> bool:
        """Whether the SDK can handle ``job``; from now on it counts as in progress.

        The SDK counts it a little later, and meanwhile the worker could exit, or the job could be stopped.
        """
        if not isinstance(job, dict) or not isinstance(job.get("id"), str) or not job["id"]:
            return False
        try:
            self.job_progress.add(job)
        except (TypeError, AttributeError):
            # the SDK turns the job's keys into attributes, and not every key can be one
            return False
        return True

    async def _fetch_stop_signals(self, session: aiohttp.ClientSession) -> list[str]:
        """In place of the SDK's ``get_stop_signals``, which fails once a second, with a line each time."""
        try:
            answer = await _poll(session, rp_job._job_stop_url())
            stopped = [job_id for job_id in (answer or {}).get("jobsToStop", []) if isinstance(job_id, str)]
        except Exception as error:
            await asyncio.sleep(self._listening.failed(error))
            return []
        self._listening.over()
        return stopped

    async def stop_job(self, job_id: str) -> bool:
        """Stops a job, and returns whether the worker has it.

        The SDK misses a job that has arrived but is not started yet; and a task that is cancelled before it first runs
        would stay in the SDK's count for ever.
        """
        if job_id in self._started:
            return bool(await super().stop_job(job_id))
        if waiting := bool(self.job_progress.get(job_id)):
            self._stopped_early.add(job_id)
        return waiting

    async def _handle(self, session: aiohttp.ClientSession, config: dict[str, Any], job: dict[str, Any]) -> None:
        if job["id"] in self._stopped_early:
            self._stopped_early.remove(job["id"])
            raise asyncio.CancelledError
        self._started.add(job["id"])
        try:
            result = await rp_job.run_job(config["handler"], job)
            if result.get("stopPod"):
                self._shut_down(1)
            await self._deliver(session, result, job["id"])
        finally:
            self._started.discard(job["id"])

    async def _deliver(self, session: aiohttp.ClientSession, result: dict[str, Any], job_id: str) -> None:
        """In place of the SDK's ``send_result``, which tries three times in four seconds and after a server error only.

        A result that waits keeps its job's place in the worker, and ends when its job is stopped. If an answer is lost,
        the platform gets the result twice.
        """
        body = json.dumps(result).encode()
        sending = Outage("send the result", job_id)
        give_up = time.monotonic() + RESULT_SECONDS
        while True:
            try:
                await _post(session, job_id, body, RESULT_TIMEOUT)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                if not _is_transient(error) or time.monotonic() > give_up:
                    log.error(f"the result is lost: {_reason(error)}", job_id)
                    return
                pause = sending.failed(error)
            else:
                sending.over()
                log.info("Finished.", job_id)
                return
            if self._shutting_down.is_set():
                await asyncio.sleep(min(pause, LAST_PAUSE_SECONDS))
            else:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._shutting_down.wait(), pause)


class QuietLog:
    """The SDK's log for its heartbeat, which logs each failure: here at most one a minute."""

    def __init__(self) -> None:
        self._logged = -SECONDS_BETWEEN_LINES

    def error(self, message: str) -> None:
        if time.monotonic() - self._logged > SECONDS_BETWEEN_LINES:
            self._logged = time.monotonic()
            log.error(message)

    def __getattr__(self, name: str) -> Any:
        return getattr(log, name)


def _is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    return not isinstance(error, aiohttp.ClientResponseError) or error.status in (408, 425, 429) or error.status >= 500


def _reason(error: Exception) -> str:
    # the exception's own text holds the URL, and with it the platform's parameters
    if isinstance(error, aiohttp.ClientResponseError):
        return f"the platform answered {error.status}, {error.message}"
    return str(error) or type(error).__name__


async def _poll(session: aiohttp.ClientSession, url: str) -> Any:
    """What the platform answers in JSON, or None if there is nothing.

    Raises:
        aiohttp.ClientError, TimeoutError, ValueError: if it does not answer, or not in JSON.
    """
    async with session.get(url, timeout=POLL_TIMEOUT) as response:
        # 400 comes with FlashBoot, says the SDK
        if response.status in (204, 400):
            return None
        response.raise_for_status()
        return await response.json()


async def _post(session: aiohttp.ClientSession, job_id: str, body: bytes, timeout: aiohttp.ClientTimeout) -> None:
    """Sends a job's result or progress.

    Raises:
        aiohttp.ClientError, TimeoutError, OSError: unless the platform takes it.
    """
    url = rp_http.JOB_DONE_URL.replace("$ID", job_id) + "&isStream=false"
    headers = {"Content-Type": "application/x-www-form-urlencoded", "charset": "utf-8", "X-Request-ID": job_id}
    async with session.post(url, data=body, headers=headers, timeout=timeout, raise_for_status=True):
        pass


@asynccontextmanager
async def progress_reports(job_id: str, report: Callable[[], dict[str, Any]]) -> AsyncIterator[None]:
    """Sends ``report()`` to the platform, once a second, for as long as the block runs; off the platform, nothing.

    The block ends only when the platform has answered the last report, so that none can arrive after the result.
    The SDK's own ``progress_update`` does not wait, and cannot be waited for.
    """
    if not on_runpod():
        yield
        return
    finished = asyncio.Event()
    reporter = asyncio.create_task(_send_reports(job_id, report, finished))
    try:
        yield
    finally:
        finished.set()
        await reporter


async def _send_reports(job_id: str, report: Callable[[], dict[str, Any]], finished: asyncio.Event) -> None:
    timeout = aiohttp.ClientTimeout(total=REPORT_TIMEOUT_SECONDS)
    async with AsyncClientSession() as session:
        while True:
            try:
                await asyncio.wait_for(finished.wait(), SECONDS_BETWEEN_REPORTS)
                return
            except TimeoutError:
                body = json.dumps({"status": "IN_PROGRESS", "output": report()}).encode()
            try:
                await _post(session, job_id, body, timeout)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                log.debug(f"a progress report was lost: {type(error).__name__}", job_id)
