"""Engines around real pipelines, and what tests look up inside them."""

import asyncio
import threading
from typing import Any

from diffusers import StableDiffusionPipeline

import handler
from src.api.request import ImageRequest
from src.generation.batch_runner import BatchRunner
from src.generation.engine import Engine
from src.generation.pending import GenerationResult
from src.settings import Settings


def build(model_id: object = None, **settings: Any) -> Engine:
    """An engine as a worker with these settings has it."""
    return handler.build_engine(Settings(model_id=model_id and str(model_id), **settings))


def around(pipe: StableDiffusionPipeline, name: str = "test", max_batch_images: int = 4) -> Engine:
    """An engine around a pipeline that tests share."""
    return Engine(BatchRunner(pipe, name), max_batch_images)


def pipe_of(engine: Engine) -> StableDiffusionPipeline:
    return engine._runner._pipe


def shut_down(engine: Engine) -> None:
    """Ends the engine's threads, which hold its pipeline until then."""
    engine._thread.shutdown()
    for thread in threading.enumerate():
        if thread.name == "stall watch":
            thread.join()


def request_for(engine: Engine, **job_input: Any) -> ImageRequest:
    return ImageRequest.parse({"prompt": "a cat", "seed": 3, "num_inference_steps": 2} | job_input, engine.limits)


def generate(engine: Engine, **job_input: Any) -> GenerationResult:
    return asyncio.run(engine.generate(request_for(engine, **job_input)))


async def until_idle(engine: Engine) -> None:
    """Waits until the engine's thread has done all that was asked of it."""
    await asyncio.wrap_future(engine._thread.submit(lambda: None))


def generate_together(engine: Engine, *requests: ImageRequest) -> list[Any]:
    """What becomes of requests that all wait while the device is busy: each a result or an exception."""
    device_is_free = threading.Event()

    async def wait() -> list[GenerationResult | BaseException]:
        engine._thread.submit(device_is_free.wait)
        answers = [asyncio.create_task(engine.generate(each)) for each in requests]
        await asyncio.sleep(0)
        device_is_free.set()
        return await asyncio.wait_for(asyncio.gather(*answers, return_exceptions=True), 120)

    return asyncio.run(wait())
