"""Programs in fresh processes. Where the imports are not the point, ``forks`` runs them sooner."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python(code: str, **environment: str) -> str:
    """Runs ``code`` in a fresh process and returns what it prints."""
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | environment, text=True, capture_output=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def users_environment() -> dict[str, str]:
    """The environment of a user, who sets no log level."""
    return {name: value for name, value in os.environ.items() if name != "RUNPOD_LOG_LEVEL"}


def run_handler(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``handler.py`` with ``arguments`` in ``folder``."""
    return subprocess.run(
        [sys.executable, ROOT / "handler.py", *arguments],
        cwd=folder,
        env=users_environment() | environment,
        text=True,
        capture_output=True,
        timeout=120,
    )
