"""What the loop between two jobs costs: ``python -m tests.bench.worker_loop``.

Jobs of a fixed duration that cannot share a batch go to a worker process behind a stand-in for the platform: to this
worker with its default settings, and to a plain synchronous handler around the same engine, on the SDK's own loop.
Printed are

- for jobs that are all sent at once, the time from the first one's arrival to the last result, as a multiple of the
  bare work time;
- for a client that sends each job when it has the result of the one before, the mean ``delayTime`` that the platform
  shows: milliseconds from ``/run`` until a worker has the job.

The last column holds the target.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean

import runpod
from PIL import Image

from src.api.limits import ModelLimits
from src.api.output import job_output
from src.api.picture import Picture
from src.api.request import ImageRequest
from src.errors import JobError
from src.generation.engine import Engine
from src.generation.pending import Progress
from src.job_handler import JobHandler
from src.serving import worker_loop
from src.settings import Settings
from src.startup.environment import ENVIRONMENT
from tests.support.client import Client, until
from tests.support.platform_stub import Platform, serving

AT_ONCE = [
    # jobs, seconds each, target
    (6, 2.0, 1.02),
    (20, 1.0, 1.02),
    (12, 0.5, 1.03),
    (26, 0.1, 1.08),
]
IN_SEQUENCE = (20, 0.1, 15)
KINDS = ("plain", "worker")


class FixedRunner:
    """A runner whose batches each take ``seconds``."""

    model_name = "fixed"
    limits = ModelLimits(native_size=128, max_size=256, scheduler="DDIM")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def run(self, requests: Sequence[ImageRequest], seeds: Sequence[int], _: object) -> list[Picture | JobError]:
        time.sleep(self.seconds)
        return [
            Picture(Image.effect_noise((request.width, request.height), 50).convert("RGB"), seed, None)
            for request, seed in zip(requests, seeds, strict=True)
        ]

    def release_memory(self) -> None:
        pass

    def prompt_warnings(self, _: ImageRequest) -> list[str]:
        return []


def serve(kind: str, seconds: float) -> None:
    """Runs the worker process."""
    settings = Settings.from_environment()
    engine = Engine(FixedRunner(seconds), settings.max_batch_images)

    def plain(job: dict) -> dict:
        request = ImageRequest.parse(job["input"], engine.limits)
        result = engine._submit(request, Progress()).result()
        return job_output(request, result.pictures, [], model_name="", max_result_bytes=settings.max_result_bytes)

    if kind == "plain":
        runpod.serverless.start({"handler": plain})
    else:
        worker_loop.serve(JobHandler(engine, settings).handle, settings.max_concurrency)


@contextmanager
def idle_worker(kind: str, seconds: float) -> Iterator[Platform]:
    """Serves a platform whose only worker is idle after a first job."""
    with serving() as platform, Path(os.devnull).open("wb") as no_log:
        command = [sys.executable, "-m", "tests.bench.worker_loop", "--serve", kind, "--seconds", str(seconds)]
        name = platform.start_worker(command, no_log, **ENVIRONMENT)
        until(lambda: platform.workers[name].pings)
        Client(platform).generate()
        time.sleep(2)
        yield platform


def time_ratio(kind: str, jobs: int, seconds: float) -> float:
    """Returns the time of ``jobs`` jobs that are sent at once, as a multiple of the bare work time."""
    with idle_worker(kind, seconds) as platform:
        client = Client(platform)
        sent = [platform.jobs[client.run(guidance_scale=2 + i)] for i in range(jobs)]
        until(lambda: not platform.busy())
        assert {job.status for job in sent} == {"COMPLETED"}
        return (max(job.finished for job in sent) - min(job.created for job in sent)) / (jobs * seconds)


def mean_delay(kind: str, jobs: int, seconds: float) -> float:
    """Returns the mean ``delayTime``, in milliseconds, of ``jobs`` jobs that are sent one after the other."""
    with idle_worker(kind, seconds) as platform:
        client = Client(platform)
        return mean(client.generate()["delayTime"] for _ in range(jobs))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what the loop between two jobs costs.")
    parser.add_argument("--serve", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve, arguments.seconds)
    print(f"{'jobs':<32}{'plain handler':>16}{'this worker':>14}{'target':>9}")
    for jobs, seconds, target in AT_ONCE:
        plain, ours = (time_ratio(kind, jobs, seconds) for kind in KINDS)
        print(f"{f'{jobs} of {seconds} s at once':<32}{plain:>16.2f}{ours:>14.2f}{target:>9.2f}", flush=True)
    jobs, seconds, target = IN_SEQUENCE
    plain, ours = (mean_delay(kind, jobs, seconds) for kind in KINDS)
    print(f"{f'{jobs} of {seconds} s in sequence':<32}{plain:>13.0f} ms{ours:>11.0f} ms{target:>6.0f} ms")


if __name__ == "__main__":
    main()
