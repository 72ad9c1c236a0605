"""Checks the shared memory in which the SDK keeps what the heartbeat tells the platform."""

from multiprocessing import Array

from src.errors import StartError


def check_shared_memory() -> None:
    """Allocates some as the SDK does once the model is loaded, where a failure would end in a traceback.

    Raises:
        StartError: if there is none.
    """
    try:
        Array("c", 1)
    except OSError as error:
        raise StartError(f"cannot write to /dev/shm, which the heartbeat needs: {error}", may_recover=True) from None
