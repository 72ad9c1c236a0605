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

from src.api import openai
from src.errors import StartError
from src.serving import log_output

if TYPE_CHECKING:
    from src.serving.worker_loop import Handler


def read_job(argument: str | None) -> dict[str, Any]:
    """Returns the job, and checks that its pictures can be saved; ``JobHandler`` validates its input.

    Args:
        argument: the value of --test_input; None means the job in test_input.json.

    Raises:
        StartError: if there is none, or they cannot be saved.
    """
    source = "test_input.json" if argument is None else "--test_input"
    try:
        # the bytes that were typed, whatever the locale made of them
        job = json.loads(Path(source).read_bytes() if argument is None else os.fsencode(argument))
    except FileNotFoundError:
        raise StartError(f"there is no {source} in {Path.cwd()}, and no --test_input") from None
    except Exception as error:
        raise StartError(f"cannot read {source}: {error}") from None
    if not (isinstance(job, dict) and isinstance(job.get("input"), dict)):
        raise StartError(f'{source} must be a job such as {{"input": {{"prompt": "..."}}}}')
    if not os.access(".", os.W_OK):
        raise StartError(f"pictures cannot be saved in {Path.cwd()}: this user cannot write to it")
    return {"id": str(job.get("id", "local_test")), "input": job["input"]}


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


def run_job(handle: "Handler", job: dict[str, Any], *, quiet: bool) -> None:
    """Runs ``job``, saves its pictures in the working directory and prints what was saved; exits with 1 if it fails.

    Args:
        handle: takes a job and returns its output or its ``error``.
        job: the job.
        quiet: whether only errors are logged, and not the result with the pictures.
    """
    from runpod import RunPodLogger

    log = RunPodLogger()
    if quiet:
        log.set_level("ERROR")
    # asked now, because the handler takes the input out of the job
    openais = openai.is_call(job)
    started = time.monotonic()
    output = asyncio.run(handle(job))
    seconds = time.monotonic() - started
    if "error" not in output:
        log.info(f"Job result: {output}")
        try:
            lines = [json.dumps(output)] if openais else save_pictures(output, seconds)
            return print(*lines, sep="\n")
        except OSError as error:
            output = {"error": f"cannot write {error.filename}: {error.strerror}"}
    log.error(f"Job {job['id']} failed with error: {openai.error_text(output['error'])}")
    log_output.exit_now(1)


def save_pictures(output: dict[str, Any], seconds: float) -> list[str]:
    """Saves the pictures of a job that took ``seconds``. Returns a line about each, and its warnings."""
    lines = []
    images = output.get("images", [output])
    for i, image in enumerate(images, start=1):
        number, ending = f"-{i}" if len(images) > 1 else "", output.get("output_format", "png")
        place = image.get("image_url") or Path(f"picture{number}.{ending}").resolve()
        if isinstance(place, Path):
            place.write_bytes(base64.b64decode(image["image"]))
        lines.append(f"{place}: seed {image['seed']}, {output['width']} x {output['height']}, {seconds:.1f} s")
    return lines + [f"warning: {warning}" for warning in output.get("warnings", [])]
