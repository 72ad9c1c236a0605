"""What the SDK's loop costs: ``python -m tests.bench.worker_loop``.

Jobs of a fixed duration, which nothing can share, go through the real loop against a stand-in of the platform: once
with this worker, once with a plain synchronous handler around the same engine. Printed is the time from the first job's
arrival to the last result, as a ratio of the pure work. A last column holds the target.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import runpod
from PIL import Image

from src.api.output import job_output
from src.api.picture import Picture
from src.api.request import ImageRequest, ModelLimits
from src.errors import JobError
from src.generation.engine import Engine
from src.generation.pending import Progress
from src.serving.worker_loop import start
from src.settings import Settings
from src.startup.import_libraries import ENVIRONMENT
from src.worker import Worker
from tests.support.client import Client, until
from tests.support.platform_stub import FINAL, serving

RUNS = [
    # jobs, seconds each, MAX_CONCURRENCY, target
    (6, 2.0, None, 1.05),
    (12, 0.5, 3, 1.15),
]


class FixedRunner:
    """Batches that each take ``seconds``."""

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
        start(Worker(engine, settings).handle, settings.max_concurrency)


def measure(kind: str, jobs: int, seconds: float, concurrency: int | None) -> float:
    """Seconds from the arrival of ``jobs`` jobs to the last one's result."""
    with serving() as platform:
        command = [sys.executable, "-m", "tests.bench.worker_loop", "--serve", kind, "--seconds", str(seconds)]
        settings = {"MAX_CONCURRENCY": str(concurrency)} if concurrency else {}
        name = platform.start_worker(command, **ENVIRONMENT, **settings)
        client = Client(platform)
        until(lambda: platform.workers[name].pings)
        client.finished(client.run())
        # the loop has gone to rest after its first job
        time.sleep(2)
        ids = [client.run(guidance_scale=2 + i) for i in range(jobs)]
        until(lambda: all(platform.jobs[job].status in FINAL for job in ids))
        assert {platform.jobs[job].status for job in ids} == {"COMPLETED"}
        return max(platform.jobs[job].finished for job in ids) - min(platform.jobs[job].created for job in ids)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what the SDK's loop costs.")
    parser.add_argument("--serve", choices=["plain", "worker"], help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve, arguments.seconds)
    print(f"{'jobs':<20}{'MAX_CONCURRENCY':>16}{'plain handler':>16}{'this worker':>14}{'target':>9}")
    for jobs, seconds, concurrency, target in RUNS:
        work = jobs * seconds
        plain, ours = (measure(kind, jobs, seconds, concurrency) / work for kind in ("plain", "worker"))
        shown = concurrency or f"{Settings().max_concurrency} (default)"
        print(f"{f'{jobs} of {seconds} s':<20}{shown:>16}{plain:>16.2f}{ours:>14.2f}{target:>9}", flush=True)


if __name__ == "__main__":
    main()
