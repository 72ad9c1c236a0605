"""The handler that RunPod's SDK calls: takes a job, returns its output or one readable error."""

import asyncio
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from runpod import RunPodLogger

from src.api import openai
from src.api.bucket import Bucket
from src.api.output import encode_all, job_output
from src.api.request import ImageRequest
from src.api.request_reader import read_request
from src.errors import JobError
from src.generation.engine import Engine
from src.generation.pending import Progress
from src.serving.progress import progress_reports as reports_to_platform
from src.settings import Settings

log = RunPodLogger()

KEPT_ANSWERS = 8
"""Each of up to ``MAX_RESULT_BYTES``. RunPod delivers a job again within seconds, if at all."""

ProgressReports = Callable[[str, Callable[[], dict[str, Any]]], AbstractAsyncContextManager[None]]
"""Takes a job's id and a callable that returns its progress; reports that progress while its block runs."""


class JobHandler:
    """Answers jobs, several at a time. ``handle`` is the ``handler`` for ``runpod.serverless.start``.

    Args:
        engine: generates the pictures.
        settings: where pictures are stored, and how large a result may be.
        progress_reports: replaces the reports to the platform.
    """

    def __init__(self, engine: Engine, settings: Settings, progress_reports: ProgressReports | None = None) -> None:
        self._engine = engine
        self._settings = settings
        self._progress_reports = progress_reports or reports_to_platform
        self._bucket = Bucket(settings) if settings.bucket_name else None
        self._answers: dict[str, asyncio.Task[dict[str, Any]]] = {}

    async def handle(self, job: dict[str, Any]) -> dict[str, Any]:
        """Returns the output of ``job``, or its ``error``, with ``refresh_worker`` if the device is lost.

        The job's input is taken out of it.

        Raises only CancelledError: for any other exception, the SDK would send a traceback to the client. The log has
        the traceback of a failure under the job's id; prompts and pictures are never logged.
        """
        answer = self._answers.get(job["id"])
        # a job that is delivered again must not wait for an answer that is being cancelled
        if not answer or answer.cancelling():
            answer = self._answers[job["id"]] = asyncio.create_task(self._answer(job))
            answer.add_done_callback(self._forget)
        # a copy, because the SDK pops keys
        return dict(await answer)

    def _forget(self, _: object) -> None:
        """Keeps the last answers, in case the platform delivers a job again, but no error, so that ``/retry`` works."""

        def is_good(answer: asyncio.Task[dict[str, Any]]) -> bool:
            return answer.done() and not answer.cancelled() and "error" not in answer.result()

        kept = [job_id for job_id, answer in self._answers.items() if is_good(answer)][-KEPT_ANSWERS:]
        for job_id, answer in list(self._answers.items()):
            if answer.done() and job_id not in kept:
                del self._answers[job_id]

    async def _answer(self, job: dict[str, Any]) -> dict[str, Any]:
        is_openais = openai.is_call(job)

        def failure(error: JobError) -> dict[str, Any]:
            return {"error": openai.word_error(error) if is_openais else str(error)}

        try:
            job_input, may_upload, faults = job.pop("input", None), True, list[str]()
            if is_openais:
                if job_input["openai_route"] == openai.MODELS:
                    return openai.list_models(self._engine.model_name)
                job_input, may_upload, faults = openai.read_input(job_input, bool(self._bucket))
            request = await read_request(job_input, self._engine.limits, faults)
            # with pictures it can have 20 MB, and the job may wait
            del job_input
            output = await self._generate(job["id"], request, may_upload)
            return openai.shape_output(output) if is_openais else output
        except JobError as error:
            if error.__cause__:
                log.error("".join(traceback.format_exception(error.__cause__)), job["id"])
            log.warn(f"failed: {str(error).split(':')[0]}", job["id"])
            return failure(error) | ({"refresh_worker": True} if error.refresh_worker else {})
        except Exception:
            log.error(traceback.format_exc(), job["id"])
            return failure(JobError(f"internal error, see the worker's log for job {job['id']}"))

    async def _generate(self, job_id: str, request: ImageRequest, may_upload: bool) -> dict[str, Any]:
        progress = Progress()

        def report() -> dict[str, Any]:
            steps = request.denoising_steps
            return {"progress": round(100 * progress.share), "step": round(steps * progress.share), "steps": steps}

        async with self._progress_reports(job_id, report):
            started = time.monotonic()
            result = await self._engine.generate(request, progress)
            finished = time.monotonic()
            links = None
            if self._bucket and may_upload:
                files = await asyncio.to_thread(encode_all, request, result.pictures, self._engine.model_name)
                links = await self._bucket.upload_all(files, job_id, request.output_format)
            output = await asyncio.to_thread(
                job_output,
                request,
                result.pictures,
                result.warnings,
                model_name=self._engine.model_name,
                max_result_bytes=self._settings.max_result_bytes,
                links=links,
            )
        log.info(
            f"generated {request.num_images} of {request.width} x {request.height} in {request.denoising_steps} "
            f"steps: {finished - started:.2f} s, encoded: {time.monotonic() - finished:.2f} s",
            job_id,
        )
        return dict(output)
