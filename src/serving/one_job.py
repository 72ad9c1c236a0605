"""A job on a person's machine: where it comes from, a progress bar, and its pictures as files."""

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
from src.serving.signals import exit_on_signals

if TYPE_CHECKING:
    from src.serving.worker_loop import Handler


def check_job(job: Any = None) -> None:
    """Checks that there is a job to run, and that its pictures can be saved; what it asks for, the worker checks.

    Args:
        job: what --test_input holds; without it, the job is that of test_input.json.

    Raises:
        StartError: otherwise.
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
    """Draws ``report()`` on the terminal for as long as the block runs; where there is no terminal, nothing."""
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


def run_job(handle: "Handler", *, quiet: bool) -> None:
    """Hands ``handle`` to the SDK, which runs the job and exits with code 1 if it failed; then says what was made.

    Args:
        handle: from a job to its output or its ``error``.
        quiet: whether to keep the SDK from logging the result, which holds the pictures, and all but errors.
    """
    import runpod

    if quiet:
        runpod.RunPodLogger().set_level("ERROR")
    # with it, as on a Pod, the SDK would serve instead
    os.environ.pop("RUNPOD_REALTIME_PORT", None)
    lines: list[str] = []
    try:
        runpod.serverless.start({"handler": keep_pictures(handle, lines)})
    finally:
        for line in lines:
            print(line)


def keep_pictures(handle: "Handler", lines: list[str]) -> "Handler":
    """``handle``, which also saves each picture in the working directory and adds what to say of it to ``lines``."""

    async def handle_and_keep(job: dict[str, Any]) -> dict[str, Any]:
        # the SDK would exit with code 0, and wait for the picture
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
