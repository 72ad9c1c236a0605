"""The two kinds of failure that are worded for a person: a client's, and an operator's."""


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
