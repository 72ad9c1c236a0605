"""The handler that RunPod's SDK calls: a job in, its output or one readable error out."""

import asyncio
import signal
import time
import traceback
from typing import Any

from runpod import RunPodLogger
from runpod.serverless.modules.worker_state import JobsProgress

from src.bucket import Bucket
from src.engine import Engine, Progress
from src.output import job_output
from src.progress import progress_reports
from src.request import ImageRequest, JobError
from src.settings import Settings

log = RunPodLogger()


class Worker:
    """Answers jobs, several at a time, and leaves when told to or when the device is lost.

    ``handle`` and ``concurrency`` are ``handler`` and ``concurrency_modifier`` for ``runpod.serverless.start``.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._bucket = Bucket(settings) if settings.bucket_name else None
        self._answers: dict[str, asyncio.Task[dict[str, Any]]] = {}
        self._on_platform = False
        self._exit_code: int | None = None

    async def handle(self, job: dict[str, Any]) -> dict[str, Any]:
        """The output of ``job``, or its ``error``.

        It never raises, since the SDK would send a traceback to the client. The log tells a failure's full story under
        the job's id; prompts and pictures are never logged.
        """
        if self._on_platform and (sdk_task := asyncio.current_task()):
            # the SDK's task ends when the result is delivered
            sdk_task.add_done_callback(lambda _: self._leave_when_done())
        answer = self._answers.get(job["id"])
        if not answer:
            answer = self._answers[job["id"]] = asyncio.create_task(self._answer(job))
            answer.add_done_callback(lambda _: self._answers.pop(job["id"]))
        # a job that the platform delivers twice is painted once; a copy, since the SDK takes it apart
        return dict(await answer)

    def concurrency(self, current: int) -> int:
        """How many jobs the SDK may hold: called in its event loop each time before it asks for more."""
        if not self._on_platform:
            self._on_platform = True
            for signal_number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(signal_number, self._leave, 0)
        # while this number is another than before, the SDK asks for nothing until its last job is delivered
        return self._settings.max_concurrency + (self._exit_code is not None)

    def _leave(self, exit_code: int) -> None:
        """Takes no more jobs, delivers those in flight, exits.

        The SDK's own way stops looking at jobs at once but goes on asking for them, up to 90 s, and loses what it gets.
        """
        self._exit_code = exit_code
        self._leave_when_done()

    def _leave_when_done(self) -> None:
        if self._exit_code is not None and not JobsProgress().get_job_count():
            raise SystemExit(self._exit_code)

    async def _answer(self, job: dict[str, Any]) -> dict[str, Any]:
        try:
            return await self._paint(job)
        except JobError as error:
            if error.__cause__:
                log.error("".join(traceback.format_exception(error.__cause__)), job["id"])
            log.warn(f"failed: {str(error).split(':')[0]}", job["id"])
            if not error.refresh_worker:
                return {"error": str(error)}
            if self._on_platform:
                self._exit_code = 1
            return {"error": str(error), "refresh_worker": True}
        except Exception:
            log.error(traceback.format_exc(), job["id"])
            return {"error": f"internal error, see the worker's log for job {job['id']}"}

    async def _paint(self, job: dict[str, Any]) -> dict[str, Any]:
        request = ImageRequest.parse(job.get("input"), self._engine.limits)
        progress = Progress()

        def report() -> dict[str, Any]:
            steps = request.num_inference_steps
            return {"progress": round(100 * progress.share), "step": round(steps * progress.share), "steps": steps}

        async with progress_reports(job["id"], report):
            started = time.monotonic()
            painted = await self._engine.generate(request, progress)
            finished = time.monotonic()
            output = await asyncio.to_thread(
                job_output,
                request,
                painted.pictures,
                painted.warnings,
                model_name=self._engine.model_name,
                max_result_bytes=self._settings.max_result_bytes,
                upload=self._bucket.uploads_under(job["id"]) if self._bucket else None,
            )
        log.info(
            f"painted {request.num_images} of {request.width} x {request.height} in {request.num_inference_steps} "
            f"steps: {finished - started:.2f} s, encoded: {time.monotonic() - finished:.2f} s",
            job["id"],
        )
        return dict(output)
