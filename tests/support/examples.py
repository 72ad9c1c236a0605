"""Runs the examples as users do, with the stand-in for RunPod."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tests.support import forks
from tests.support.forks import Fork, Process, run_script
from tests.support.platform_stub import Platform, serving
from tests.support.processes import ROOT

EXAMPLES = ROOT / "examples"
SHORT_PAUSES = f"{ROOT / 'tests' / 'support' / 'bin'}:{os.environ['PATH']}"
"""A ``PATH`` whose ``sleep`` returns almost at once."""


def environment(platform: Platform, **more: str) -> dict[str, str]:
    """Returns the environment variables that a user of ``platform`` sets."""
    return {"ENDPOINT_URL": f"{platform.url}/v2/local", "RUNPOD_API_KEY": platform.key, "PATH": SHORT_PAUSES} | more


def start(command: list[object], folder: Path, set_by_user: dict[str, str], **outputs: IO[bytes]) -> Process:
    """Starts ``command`` in a session of its own, with the variables that a user sets; a Python script, in a fork."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("ENDPOINT_", "RUNPOD_"))}
    settings: dict[str, Any] = outputs | {"cwd": folder, "env": env | set_by_user}
    if command[0] == sys.executable:
        return Fork(run_script, *map(str, command[1:]), **settings)
    return subprocess.Popen(command, start_new_session=True, **settings)


def run(command: list[object], folder: Path, **set_by_user: str) -> subprocess.CompletedProcess[str]:
    return forks.run(start, command, folder, set_by_user)


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
