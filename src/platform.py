"""All that reaches into RunPod's SDK beyond its documented calls: its worker loop, and the reports of progress."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import runpod
from runpod.http_client import AsyncClientSession
from runpod.serverless.modules import rp_http, rp_job, rp_scale

from src.settings import on_runpod

SECONDS_BETWEEN_REPORTS = 1.0
REPORT_TIMEOUT_SECONDS = 30.0
"""How long the platform may take to answer a report of progress."""

log = runpod.RunPodLogger()

Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


def start(handle: Handler, max_concurrency: int) -> None:
    """Hands ``handle`` to the SDK, which returns when a local run is done, and on the platform never.

    Args:
        handle: from a job to its output or its ``error``.
        max_concurrency: how many jobs the worker holds at once.
    """
    rp_scale.JobScaler = WorkerLoop
    runpod.serverless.start({"handler": handle, "concurrency_modifier": lambda _: max_concurrency})


class WorkerLoop(rp_scale.JobScaler):  # type: ignore[misc]
    """The SDK's worker loop, with its own way to shut down."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.jobs_fetcher = self._fetch_jobs
        self.jobs_handler = self._handle
        self._shutting_down: asyncio.Task[None] | None = None
        self._fetching: asyncio.Task[Any] | None = None

    async def run(self) -> None:
        """Takes and handles jobs until it is told to shut down.

        The SDK, told by a signal, stops looking at jobs at once but goes on asking for them, up to 90 s, and loses what
        it gets.
        """
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(signal_number, self._shut_down, 0)
        await super().run()

    def _shut_down(self, exit_code: int) -> None:
        """Takes no more jobs, delivers those in flight, exits."""
        if not self._shutting_down:
            self._shutting_down = asyncio.create_task(self._exit_when_idle(exit_code))
            if self._fetching:
                self._fetching.cancel()

    async def _exit_when_idle(self, exit_code: int) -> None:
        # the SDK drops a job from here when its result is delivered
        while self.job_progress.get_job_count():
            await asyncio.sleep(0.1)
        raise SystemExit(exit_code)

    async def _fetch_jobs(self, session: aiohttp.ClientSession, wanted: int) -> list[dict[str, Any]] | None:
        self._fetching = asyncio.current_task()
        try:
            if self._shutting_down:
                await self._shutting_down
            jobs: list[dict[str, Any]] | None = await rp_job.get_job(session, wanted)
            return jobs
        except asyncio.CancelledError:
            # cancelled, it would end the loop
            if not self._shutting_down:
                raise
            return None

    async def _handle(self, session: aiohttp.ClientSession, config: dict[str, Any], job: dict[str, Any]) -> None:
        result = await rp_job.run_job(config["handler"], job)
        if result.get("stopPod"):
            self._shut_down(1)
        await rp_job.send_result(session, result, job)


@asynccontextmanager
async def progress_reports(job_id: str, report: Callable[[], dict[str, Any]]) -> AsyncIterator[None]:
    """Sends ``report()`` to the platform, once a second, for as long as the block runs; off the platform, nothing.

    The block is left only when the platform has answered the last report, so that none can arrive after the result.
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
    url = rp_http.JOB_DONE_URL.replace("$ID", job_id) + "&isStream=false"
    headers = {"Content-Type": "application/x-www-form-urlencoded", "X-Request-ID": job_id}
    async with AsyncClientSession() as session:
        while True:
            try:
                await asyncio.wait_for(finished.wait(), SECONDS_BETWEEN_REPORTS)
                return
            except TimeoutError:
                body = json.dumps({"status": "IN_PROGRESS", "output": report()})
            try:
                timeout = aiohttp.ClientTimeout(total=REPORT_TIMEOUT_SECONDS)
                async with session.post(url, data=body, headers=headers, timeout=timeout, raise_for_status=True):
                    pass
            except (aiohttp.ClientError, TimeoutError) as error:
                log.debug(f"a progress report was lost: {type(error).__name__}", job_id)
