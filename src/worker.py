"""The handler that RunPod's SDK calls: a job in, its output or one readable error out."""

import asyncio
import time
import traceback
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from runpod import RunPodLogger

from src.engine import Engine
from src.output import job_output
from src.request import ImageRequest, JobError
from src.settings import Settings

Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]

log = RunPodLogger()


def make_handler(engine: Engine, settings: Settings) -> Handler:
    """The async handler for ``runpod.serverless.start``.

    It never raises, since the SDK would send a traceback to the client. The log tells a failure's full story under
    the job's id; prompts and pictures are never logged.
    """

    async def paint(job: dict[str, Any]) -> dict[str, Any]:
        request = ImageRequest.parse(job.get("input"), engine.limits)
        started = time.monotonic()
        painted = await engine.generate(request)
        finished = time.monotonic()
        encode = partial(job_output, model_name=engine.model_name, max_result_bytes=settings.max_result_bytes)
        output = await asyncio.to_thread(encode, request, painted.pictures, painted.warnings)
        log.info(
            f"painted {request.num_images} of {request.width} x {request.height} in {request.num_inference_steps} "
            f"steps: {finished - started:.2f} s, encoded: {time.monotonic() - finished:.2f} s",
            job["id"],
        )
        return output

    async def handle(job: dict[str, Any]) -> dict[str, Any]:
        try:
            return await paint(job)
        except JobError as error:
            if error.__cause__:
                log.error("".join(traceback.format_exception(error.__cause__)), job["id"])
            log.warn(f"failed: {str(error).split(':')[0]}", job["id"])
            return {"error": str(error)} | ({"refresh_worker": True} if error.refresh_worker else {})
        except Exception:
            log.error(traceback.format_exc(), job["id"])
            return {"error": f"internal error, see the worker's log for job {job['id']}"}

    return handle
