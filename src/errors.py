"""The two kinds of errors that are written for people: for clients, and for the operator."""

import textwrap

MAX_QUOTED_CHARACTERS = 40
"""The maximum number of characters that an error quotes of a value."""


class JobError(Exception):
    """Why a job failed, in words for the client.

    Args:
        message: what the client reads.
        refresh_worker: whether RunPod should replace this worker.
    """

    def __init__(self, message: str, *, refresh_worker: bool = False) -> None:
        super().__init__(message)
        self.refresh_worker = refresh_worker


class InvalidInput(JobError):
    """Everything that is wrong with a job's input.

    Args:
        faults: each in words for the client, beginning with the field's name if it is about one: ``seed: must be ...``.
    """

    def __init__(self, *faults: str) -> None:
        super().__init__(f"invalid input: {'; '.join(faults)}")
        self.faults = faults


class StartError(Exception):
    """Why the worker cannot start, in one line for the operator.

    Args:
        message: the line.
        may_recover: whether a restart, perhaps on another host, may succeed.
    """

    def __init__(self, message: str, *, may_recover: bool = False) -> None:
        super().__init__(message)
        self.may_recover = may_recover


def one_line(error: BaseException) -> str:
    """Formats an error as one line, with its type unless it was written for people."""
    if isinstance(error, JobError | StartError):
        return _printable(str(error))
    line = _printable(next(iter(str(error).strip().splitlines()), ""))
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def shortened(value: object) -> str:
    """Formats a value from outside for quoting in an error: on one line, cut if it is long."""
    if isinstance(value, int) and value.bit_length() > 128:
        return "a huge number"
    text = str(value)
    return _printable(text[:MAX_QUOTED_CHARACTERS]) + "..." * (len(text) > MAX_QUOTED_CHARACTERS)


def condensed(text: object, most: int = 200) -> str:
    """Formats what another program says on one line of at most ``most`` characters."""
    return _printable(textwrap.shorten(str(text), most, placeholder="..."))


def _printable(text: str) -> str:
    """Replaces control characters, line separators, invisible characters and lone surrogates."""
    return "".join(character if character.isprintable() else "?" for character in text)
