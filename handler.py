"""The door: settings -> pipeline -> engine -> worker, then RunPod's loop.

python handler.py                  paints test_input.json into picture.png
python handler.py --rp_serve_api   serves /run, /runsync and /status on localhost:8000
"""

import base64
import os
import sys
import time
from pathlib import Path
from typing import Any

# both are read at import: the SDK's default, DEBUG, logs prompts and pictures, and transformers names what it misses
os.environ.setdefault("RUNPOD_LOG_LEVEL", os.environ.get("RUNPOD_DEBUG_LEVEL", "INFO"))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import runpod

from src import pipeline
from src.engine import Engine
from src.request import JobError
from src.settings import Settings, StartError, on_runpod
from src.worker import Handler, make_handler

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


def main() -> None:
    try:
        settings = Settings.from_environment()
        engine = Engine(pipeline.load(settings))
        started = time.monotonic()
        engine.warm_up()
        log.info(f"warm-up: {time.monotonic() - started:.1f} s")
    except (StartError, JobError) as error:
        log.error(f"the worker cannot start: {error}")
        sys.exit(1)

    handle, kept = make_handler(engine, settings), list[Path]()
    if not on_runpod() and "--rp_serve_api" not in sys.argv:
        handle = keep_pictures(handle, kept)
    try:
        runpod.serverless.start({"handler": handle})
    finally:
        for path in kept:
            print(f"picture: {path}")


if __name__ == "__main__":
    main()
