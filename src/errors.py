"""The two kinds of failure that are worded for a person: a client's, and an operator's."""

MAX_QUOTED_CHARACTERS = 40
"""How much of a value an error quotes."""


class JobError(Exception):
    """Why a job failed, in words for the client.

    Args:
        message: what the client reads.
        refresh_worker: whether RunPod should replace this worker.
    """

    def __init__(self, message: str, *, refresh_worker: bool = False) -> None:
        super().__init__(message)
        self.refresh_worker = refresh_worker


class StartError(Exception):
    """Why the worker cannot start, in one line for its operator."""


def shortened(value: object) -> str:
    """``value`` as an error quotes it."""
    if isinstance(value, int) and value.bit_length() > 128:
        return "a huge number"
    text = printable(str(value))
    return text if len(text) <= MAX_QUOTED_CHARACTERS else text[:MAX_QUOTED_CHARACTERS] + "..."


def printable(text: str) -> str:
    """``text`` without lone surrogates, which no encoding can write."""
    return text.encode("utf-8", "replace").decode()
