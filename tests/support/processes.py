"""Programs that tests run to their end in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAULTY = [sys.executable, "-m", "tests.support.faulty_worker"]
"""The command of a worker that fails when a prompt or its environment asks for it."""


def python(code: str, **environment: str) -> str:
    """What ``code`` prints in a process of its own, where nothing is imported yet."""
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | environment, text=True, capture_output=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def run_handler(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``handler.py`` as a person does, who sets no log level."""
    bare = {name: value for name, value in os.environ.items() if name != "RUNPOD_LOG_LEVEL"}
    return subprocess.run(
        [sys.executable, ROOT / "handler.py", *arguments],
        cwd=folder,
        env=bare | environment,
        text=True,
        capture_output=True,
        timeout=120,
    )
