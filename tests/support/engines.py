"""Engines around real pipelines, and access to their private attributes, which tests reach only here."""

import asyncio
import threading
from typing import Any

from diffusers import SchedulerMixin, StableDiffusionPipeline

import handler
from src.api.request import ImageRequest
from src.generation.batch_runner import BatchRunner
from src.generation.engine import Engine
from src.generation.pending import GenerationResult
from src.settings import Settings


def build(model_id: object = None, **settings: Any) -> Engine:
    """Builds the engine of a worker with these settings."""
    return handler.build_engine(Settings(model_id=model_id and str(model_id), **settings))


def around(pipe: StableDiffusionPipeline, name: str = "test", max_batch_images: int = 4) -> Engine:
    """Builds an engine around a pipeline that tests share."""
    return Engine(BatchRunner(pipe, name), max_batch_images)


def runner_of(engine: Engine) -> BatchRunner:
    return engine._runner


def pipe_of(engine: Engine) -> StableDiffusionPipeline:
    return runner_of(engine)._pipe


def new_scheduler(engine: Engine, name: str) -> SchedulerMixin:
    """Makes the scheduler for a request that names it."""
    return runner_of(engine)._new_scheduler(name)


def occupy(engine: Engine, released: threading.Event) -> None:
    """Keeps the device busy until ``released`` is set, so that requests wait and share a batch."""
    engine._thread.submit(released.wait)


def waiting(engine: Engine) -> int:
    """Returns the number of images that wait for the device."""
    return len(engine._waiting)


def shut_down(engine: Engine) -> None:
    """Ends the engine's threads, which keep its pipeline in memory."""
    engine._thread.shutdown()
    watch = engine._watch
    watch._stalled, watch._timeout = lambda: None, 0
    for thread in threading.enumerate():
        if getattr(thread, "_target", None) == watch._watch:
            thread.join()


def request_for(engine: Engine, **job_input: Any) -> ImageRequest:
    return ImageRequest.parse({"prompt": "a cat", "seed": 3, "num_inference_steps": 2} | job_input, engine.limits)


def generate(engine: Engine, **job_input: Any) -> GenerationResult:
    return asyncio.run(engine.generate(request_for(engine, **job_input)))


async def until_idle(engine: Engine) -> None:
    """Waits until the engine's thread has finished all its work."""
    await asyncio.wrap_future(engine._thread.submit(lambda: None))


def generate_together(engine: Engine, *requests: ImageRequest) -> list[Any]:
    """Submits requests while the device is busy, then returns a result or an exception for each."""
    device_is_free = threading.Event()

    async def wait() -> list[GenerationResult | BaseException]:
        occupy(engine, device_is_free)
        answers = [asyncio.create_task(engine.generate(each)) for each in requests]
        await asyncio.sleep(0)
        device_is_free.set()
        return await asyncio.wait_for(asyncio.gather(*answers, return_exceptions=True), 120)

    return asyncio.run(wait())
