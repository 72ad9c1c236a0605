"""Access to private attributes of ``src`` and of RunPod's SDK, which tests reach only here and in ``engines``."""

from src.generation.batch_runner import BatchRunner
from src.worker import Worker


def runner_of(worker: Worker) -> BatchRunner:
    return worker._engine._runner


def finish_uploads(worker: Worker) -> None:
    """Waits until the worker's bucket has finished or given up all uploads; it takes no more."""
    worker._bucket._threads.shutdown()
