"""Access to private attributes of ``src`` and of RunPod's SDK, which tests reach only here and in ``engines``."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import runpod

from src.generation.batch_runner import BatchRunner
from src.startup import prefetch
from src.worker import Worker


def runner_of(worker: Worker) -> BatchRunner:
    return worker._engine._runner


def finish_uploads(worker: Worker) -> None:
    """Waits until the worker's bucket has finished or given up all uploads; it takes no more."""
    worker._bucket._threads.shutdown()


def read_ahead(files: Iterable[Path]) -> None:
    prefetch._read_ahead(files)


def compute_something_small(device: str) -> None:
    prefetch._compute_something_small(device)


def record_kernel_loading(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the loading of kernels. The list gets the device of each call."""
    devices: list[str] = []
    monkeypatch.setattr(prefetch, "_compute_something_small", devices.append)
    return devices


def options_of_the_sdk() -> list[str]:
    """Returns the options of the SDK's command line."""
    return [action.option_strings[0] for action in runpod.serverless.parser._actions]
