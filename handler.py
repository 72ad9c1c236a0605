"""The entry point: settings -> pipeline -> engine -> worker, then RunPod's loop.

python handler.py                  paints what test_input.json asks for
python handler.py --check          starts, says what a start takes, and exits
python handler.py --rp_serve_api   serves /run, /runsync and /status on localhost:8000
"""

import base64
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from src import startup
from src.request import JobError
from src.settings import Settings, StartError, misspelt, on_runpod

if TYPE_CHECKING:
    from src.worker import Worker

Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]

ENVIRONMENT = {
    # the SDK's default, DEBUG, logs prompts and pictures
    "RUNPOD_LOG_LEVEL": os.environ.get("RUNPOD_DEBUG_LEVEL", "INFO"),
    # the picture painted at start proves more of the machine than the SDK's own checks, which would come after it
    "RUNPOD_SKIP_GPU_CHECK": "true",
    "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
    # transformers tells at every import which optional packages are not there
    "TRANSFORMERS_VERBOSITY": "error",
}
"""What the libraries read from their environment, most of it at import, unless it says otherwise."""


def build_worker(settings: Settings) -> "Worker":
    """Imports what paints, loads the model and paints a first picture; the log tells what each took.

    Raises:
        StartError: if the model cannot be loaded.
        JobError: if it cannot paint.
    """
    begun = time.monotonic()
    startup.begin(settings)
    # these imports are most of a cold start: they wait until the disk is at work
    from src import pipeline
    from src.engine import Engine
    from src.worker import Worker

    log = pipeline.log
    for hint in misspelt():
        log.warn(hint)
    log.info(f"imports: {time.monotonic() - begun:.1f} s")
    engine = Engine(pipeline.load(settings), settings.max_batch_images)
    loaded = time.monotonic()
    engine.warm_up()
    log.info(f"warm-up: {time.monotonic() - loaded:.1f} s")
    startup.finish()
    log.info(f"ready: {pipeline.memory_in_use()}, {time.monotonic() - begun:.1f} s in all")
    return Worker(engine, settings)


def keep_pictures(handle: Handler, kept: list[Path]) -> Handler:
    """``handle``, which also writes each picture into the working directory and adds its path to ``kept``."""

    async def handle_and_keep(job: dict[str, Any]) -> dict[str, Any]:
        output = await handle(job)
        images = [image for image in output.get("images", [output]) if "image" in image]
        for i, image in enumerate(images, start=1):
            ending = output.get("output_format", "png")
            path = Path(f"picture-{i}.{ending}" if len(images) > 1 else f"picture.{ending}").resolve()
            path.write_bytes(base64.b64decode(image["image"]))
            kept.append(path)
        return output

    return handle_and_keep


def refuse_to_start(error: Exception) -> NoReturn:
    """Says why and exits with code 1. On the platform the SDK does it, and tells the host that the worker is unfit."""
    import runpod

    runpod.RunPodLogger().error(f"the worker cannot start: {error}")
    if on_runpod():

        def the_worker_can_start() -> None:
            raise error

        runpod.serverless.register_fitness_check(the_worker_can_start)
        runpod.serverless.start({"handler": None})
    sys.exit(1)


def main() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        settings = Settings.from_environment()
        worker = build_worker(settings)
    except (StartError, JobError) as error:
        refuse_to_start(error)
    if "--check" in sys.argv:
        return

    from src import platform

    handle: Handler = worker.handle
    kept: list[Path] = []
    if not on_runpod() and "--rp_serve_api" not in sys.argv:
        handle = keep_pictures(handle, kept)
    try:
        platform.start(handle, settings.max_concurrency)
    finally:
        for path in kept:
            print(f"picture: {path}")


if __name__ == "__main__":
    main()
