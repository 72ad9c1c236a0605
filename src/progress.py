"""What ``/status`` shows while a job runs."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from runpod import RunPodLogger
from runpod.http_client import AsyncClientSession
from runpod.serverless.modules.rp_http import JOB_DONE_URL

from src.settings import on_runpod

SECONDS_BETWEEN_REPORTS = 1.0
ANSWER_SECONDS = 30.0
"""How long the platform may take to answer a report, in seconds."""

log = RunPodLogger()


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
    url = JOB_DONE_URL.replace("$ID", job_id) + "&isStream=false"
    headers = {"Content-Type": "application/x-www-form-urlencoded", "X-Request-ID": job_id}
    async with AsyncClientSession() as session:
        while True:
            try:
                await asyncio.wait_for(finished.wait(), SECONDS_BETWEEN_REPORTS)
                return
            except TimeoutError:
                body = json.dumps({"status": "IN_PROGRESS", "output": report()})
            try:
                timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
                async with session.post(url, data=body, headers=headers, timeout=timeout, raise_for_status=True):
                    pass
            except (aiohttp.ClientError, TimeoutError) as error:
                log.debug(f"a progress report was lost: {type(error).__name__}", job_id)
