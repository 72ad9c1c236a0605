"""What a worker does when it cannot start."""

import traceback
from typing import Any, NoReturn

import runpod

from src.api import openai
from src.errors import JobError, StartError, one_line
from src.serving import worker_loop
from src.serving.log_output import exit_now
from src.settings import Settings

log = runpod.RunPodLogger()


def refuse_to_start(error: Exception, *, takes_jobs: bool) -> NoReturn:
    """Logs the reason, then exits with code 1 or answers jobs for ever.

    Args:
        error: what went wrong.
        takes_jobs: whether this is a worker of an endpoint. If so, and a restart may succeed, the worker reports itself
            as unhealthy. If no restart can help, jobs would wait until their ttl, so the worker takes them and answers
            each with the reason.
    """
    unexpected = error.__cause__ if isinstance(error, JobError) else error
    if unexpected and not isinstance(error, StartError):
        log.error("".join(traceback.format_exception(unexpected)))
    log.error(f"the worker cannot start: {one_line(error)}")
    if takes_jobs and isinstance(error, StartError) and not error.may_recover:
        _answer_jobs(one_line(error))
    elif takes_jobs:
        _report_unhealthy(error)
    exit_now(1)


def _answer_jobs(reason: str) -> None:
    async def handle(job: dict[str, Any]) -> dict[str, Any]:
        log.error(f"failed: the worker cannot start: {reason}", job["id"])
        message = f"this endpoint cannot start: {reason}"
        return {"error": openai.word_error(JobError(message)) if openai.is_call(job) else message}

    worker_loop.serve(handle, Settings().max_concurrency)


def _report_unhealthy(error: Exception) -> None:
    def report_start_error() -> None:
        raise error

    runpod.serverless.register_fitness_check(report_start_error)
    runpod.serverless.start({"handler": None})
