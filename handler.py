"""The door: settings -> pipeline -> engine -> worker, then RunPod's loop.

python handler.py                  paints test_input.json into picture.png
python handler.py --rp_serve_api   serves /run, /runsync and /status on localhost:8000
"""

import base64
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn

# both are read at import: the SDK's default, DEBUG, logs prompts and pictures, and transformers names what it misses
os.environ.setdefault("RUNPOD_LOG_LEVEL", os.environ.get("RUNPOD_DEBUG_LEVEL", "INFO"))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import runpod

from src import pipeline
from src.engine import Engine
from src.request import JobError
from src.settings import Settings, StartError, on_runpod
from src.worker import Worker

Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]

log = runpod.RunPodLogger()


def keep_pictures(handle: Handler, kept: list[Path]) -> Handler:
    """``handle``, which also writes each picture into the working directory and adds its path to ``kept``."""

    async def handle_and_keep(job: dict[str, Any]) -> dict[str, Any]:
        output = await handle(job)
        images = [image for image in output.get("images", [output]) if "image" in image]
        for i, image in enumerate(images, start=1):
            path = Path(f"picture-{i}.png" if len(images) > 1 else "picture.png").resolve()
            path.write_bytes(base64.b64decode(image["image"]))
            kept.append(path)
        return output

    return handle_and_keep


def refuse_to_start(error: Exception) -> NoReturn:
    """Says why and exits with code 1. On the platform the SDK does it, and tells the host that the worker is unfit."""
    log.error(f"the worker cannot start: {error}")
    if on_runpod():

        @runpod.serverless.register_fitness_check
        def the_worker_can_start() -> None:
            raise error

        runpod.serverless.start({"handler": None})
    sys.exit(1)


def main() -> None:
    try:
        settings = Settings.from_environment()
        engine = Engine(pipeline.load(settings), settings.max_batch_images)
        started = time.monotonic()
        engine.warm_up()
        log.info(f"warm-up: {time.monotonic() - started:.1f} s")
    except (StartError, JobError) as error:
        refuse_to_start(error)

    worker = Worker(engine, settings)
    handle, kept = worker.handle, list[Path]()
    if not on_runpod() and "--rp_serve_api" not in sys.argv:
        handle = keep_pictures(handle, kept)
    try:
        runpod.serverless.start({"handler": handle, "concurrency_modifier": worker.concurrency})
    finally:
        for path in kept:
            print(f"picture: {path}")


if __name__ == "__main__":
    main()
