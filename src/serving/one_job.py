"""A job on your own machine: reads it, shows a progress bar, and saves its pictures as files."""

import asyncio
import base64
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from src.errors import StartError
from src.serving import log_output
from src.serving.signals import exit_on_signals

if TYPE_CHECKING:
    from src.serving.worker_loop import Handler


def check_job(job: Any = None) -> None:
    """Checks that there is a job and that its pictures can be saved; the worker validates its input.

    Args:
        job: the value of --test_input; None means the job in test_input.json.

    Raises:
        StartError: if there is none, or they cannot be saved.
    """
    source = "--test_input"
    if job is None:
        source = "test_input.json"
        try:
            job = json.loads(Path(source).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise StartError(f"there is no {source} in {Path.cwd()}, and no --test_input") from None
        except (OSError, ValueError) as error:
            raise StartError(f"cannot read {source}: {error}") from None
    if not (isinstance(job, dict) and isinstance(job.get("input"), dict)):
        raise StartError(f'{source} must be a job such as {{"input": {{"prompt": "..."}}}}')
    if not os.access(".", os.W_OK):
        raise StartError(f"pictures cannot be saved in {Path.cwd()}: it may not be written by this user")


@asynccontextmanager
async def progress_bar(job_id: str, report: Callable[[], dict[str, Any]]) -> AsyncIterator[None]:
    """Shows ``report()`` on the terminal while the block runs; without a terminal, shows nothing."""
    # a line of standard output must come before the bar or after it
    log_output.drain()
    with tqdm(total=report()["steps"], unit="step", leave=False, disable=None) as bar:

        async def draw() -> None:
            while True:
                bar.update(report()["step"] - bar.n)
                await asyncio.sleep(0.1)

        drawing = asyncio.create_task(draw())
        try:
            yield
        finally:
            drawing.cancel()
    log_output.drain()


def run_job(handle: "Handler", *, quiet: bool) -> None:
    """Hands ``handle`` to the SDK, which runs the job and exits with code 1 if it fails; then prints what was saved.

    Args:
        handle: takes a job and returns its output or its ``error``.
        quiet: whether the SDK logs errors only, and not the result with the pictures.
    """
    import runpod

    if quiet:
        runpod.RunPodLogger().set_level("ERROR")
    # if it is set, as on a Pod, the SDK serves instead
    os.environ.pop("RUNPOD_REALTIME_PORT", None)
    lines: list[str] = []
    try:
        runpod.serverless.start({"handler": keep_pictures(handle, lines)})
    finally:
        for line in lines:
            print(line)


def keep_pictures(handle: "Handler", lines: list[str]) -> "Handler":
    """Wraps ``handle`` to save each picture in the working directory and add a line about it to ``lines``."""

    async def handle_and_keep(job: dict[str, Any]) -> dict[str, Any]:
        # with its own signal handlers the SDK would wait for the picture and exit with code 0
        exit_on_signals()
        started = time.monotonic()
        output = await handle(job)
        if "error" in output:
            return output
        seconds = f"{time.monotonic() - started:.1f} s"
        images = output.get("images", [output])
        for i, image in enumerate(images, start=1):
            number, ending = f"-{i}" if len(images) > 1 else "", output.get("output_format", "png")
            place = image.get("image_url") or Path(f"picture{number}.{ending}").resolve()
            if isinstance(place, Path):
                try:
                    place.write_bytes(base64.b64decode(image["image"]))
                except OSError as error:
                    return {"error": f"cannot write {place}: {error.strerror}"}
            lines.append(f"{place}: seed {image['seed']}, {output['width']} x {output['height']}, {seconds}")
        lines.extend(f"warning: {warning}" for warning in output.get("warnings", []))
        return output

    return handle_and_keep
