"""Notification of a client's server that a job has ended."""

import asyncio
import sys
from typing import Any

import aiohttp

ATTEMPTS = 3
PAUSE = 10_000
"""Milliseconds between two attempts."""


async def deliver(url: str, body: dict[str, Any], pause: float) -> None:
    """POSTs ``body`` to ``url`` until it answers 200, up to ``ATTEMPTS`` times, ``pause`` seconds apart."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(pause)
            try:
                async with session.post(url, json=body) as answer:
                    if answer.status == 200:
                        return
                    reason = f"it answered {answer.status}"
            except (aiohttp.ClientError, TimeoutError) as error:
                reason = str(error) or type(error).__name__
            print(f"webhook of job {body['id']}, attempt {attempt + 1} of {ATTEMPTS}: {reason}", file=sys.stderr)
