"""Progress reports: what ``/status`` shows while a job runs.

The SDK's ``progress_update`` (1.12.0) sends each report from a thread of its own, so one can arrive after the result.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from runpod.http_client import AsyncClientSession

from src.serving.delivery import post
from src.settings import on_runpod

INTERVAL = 1.0  # seconds between two reports
TIMEOUT = 5.0  # seconds that the platform has to answer one, for which a finished picture waits


@asynccontextmanager
async def progress_reports(job_id: str, report: Callable[[], dict[str, Any]]) -> AsyncIterator[None]:
    """Sends ``report()`` to the platform once a second while the block runs; does nothing elsewhere.

    The block ends only when the platform has answered the last report, so none can arrive after the result. A job that
    is stopped has no result, and waits for nothing.
    """
    if not on_runpod():
        yield
        return
    finished = asyncio.get_running_loop().create_future()
    reporter = asyncio.create_task(_send_reports(job_id, report, finished))
    try:
        yield
    except asyncio.CancelledError:
        reporter.cancel()
        raise
    finally:
        finished.set_result(None)
        await reporter


async def _send_reports(job_id: str, report: Callable[[], dict[str, Any]], finished: asyncio.Future[None]) -> None:
    async with AsyncClientSession() as session:
        while True:
            await asyncio.wait([finished], timeout=INTERVAL)
            if finished.done():
                return
            body = json.dumps({"status": "IN_PROGRESS", "output": report()}).encode()
            # the next report makes up for one that is lost
            with suppress(Exception):
                await post(session, job_id, body, TIMEOUT)
