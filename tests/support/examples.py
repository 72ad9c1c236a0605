"""Runs the examples as users do, with the stand-in for RunPod."""

import asyncio
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.platform_stub import Platform, serving
from tests.support.processes import ROOT

EXAMPLES = ROOT / "examples"
SHORT_PAUSES = f"{ROOT / 'tests' / 'support' / 'bin'}:{os.environ['PATH']}"
"""A ``PATH`` whose ``sleep`` returns almost at once."""


def environment(platform: Platform, **more: str) -> dict[str, str]:
    """Returns the environment variables that a user of ``platform`` sets."""
    return {"ENDPOINT_URL": f"{platform.url}/v2/local", "RUNPOD_API_KEY": platform.key, "PATH": SHORT_PAUSES} | more


def run(command: list[object], folder: Path, **set_by_user: str) -> subprocess.CompletedProcess[str]:
    """Runs ``command`` in ``folder`` with the variables that a user sets."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("ENDPOINT_", "RUNPOD_"))}
    return subprocess.run(command, cwd=folder, env=env | set_by_user, text=True, capture_output=True, timeout=120)


@contextmanager
def ending_its_job(status: str, result: dict[str, Any] | None = None) -> Iterator[Platform]:
    """Serves a platform without workers, which ends its first job with ``status`` and ``result``."""
    with serving() as platform:

        async def end() -> None:
            await platform.until(lambda: bool(platform.jobs), 60)
            (job,) = platform.jobs.values()
            platform.end(job, status, result)

        ending = asyncio.run_coroutine_threadsafe(end(), platform.loop)
        yield platform
        # if no job came
        ending.cancel()
