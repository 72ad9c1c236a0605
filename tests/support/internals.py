"""Access to private attributes of ``src`` and of libraries, which tests reach only here and in ``engines``."""

import asyncio
import json
from collections import deque
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import runpod
import torch
from runpod.serverless.modules import rp_ping

from src.api.bucket import Bucket
from src.generation.batch_runner import BatchRunner
from src.generation.cuda_graphs import GraphedStep
from src.generation.engine import Engine
from src.job_handler import JobHandler
from src.serving import taken_jobs
from src.serving.heartbeat import JobIds
from src.serving.taken_jobs import Job
from src.serving.worker_loop import WorkerLoop
from src.settings import Settings
from src.startup import prefetch


def runner_of(job_handler: JobHandler) -> BatchRunner:
    return job_handler._engine._runner


def finish_uploads(job_handler: JobHandler) -> None:
    """Waits until its bucket has finished or given up all uploads; it takes no more."""
    job_handler._bucket._threads.shutdown()


def sign_a_link(settings: Settings) -> str:
    """Has botocore do for a bucket all that it does without a network."""
    bucket = Bucket(settings)
    return bucket._client.generate_presigned_url("put_object", Params={"Bucket": bucket._name, "Key": "a/b.png"})


def read_ahead(files: Iterable[Path]) -> None:
    prefetch._read_ahead(files)


def compute_something_small(device: str) -> None:
    prefetch._compute_something_small(device)


def record_kernel_loading(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the loading of kernels. The list gets the device of each call."""
    devices: list[str] = []
    monkeypatch.setattr(prefetch, "_compute_something_small", devices.append)
    return devices


def options_of_the_sdk() -> list[str]:
    """Returns the options of the SDK's command line."""
    return [action.option_strings[0] for action in runpod.serverless.parser._actions]


async def stop_jobs(loop: WorkerLoop, *jobs: str) -> None:
    """Has the loop read a stop signal for ``jobs``."""
    await loop._stop_jobs(bytearray(json.dumps({"jobsToStop": jobs}), "ascii"))


def remembered_stops(loop: WorkerLoop) -> Collection[str]:
    """Returns the jobs that were stopped before they arrived."""
    return loop._stopped_early


def shut_down(loop: WorkerLoop) -> None:
    """Does what SIGTERM does."""
    loop._shutting_down.set()


def reads_jobs(loop: WorkerLoop) -> bool:
    """Whether an answer with jobs is arriving."""
    return loop._reading.locked()


def remembered_answers(loop: WorkerLoop) -> deque[str]:
    """Returns the jobs that were answered without an error."""
    return loop._answered


def begin_job(loop: WorkerLoop, session: aiohttp.ClientSession, job: Job) -> None:
    loop._session = session
    loop._begin(job)


def tasks_of(loop: WorkerLoop) -> Collection[asyncio.Task]:
    """Returns the tasks of the jobs in progress."""
    return loop._jobs


def split(text: str) -> Any:
    """Cuts a JSON array or object into the texts of its members."""
    return taken_jobs._split(text)


def send_ping(heartbeat: rp_ping.Heartbeat, jobs: str | None = None) -> None:
    heartbeat._mirror = JobIds()
    heartbeat._mirror.set(jobs)
    heartbeat._send_ping()


def replace_answer(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., Any]) -> None:
    """Replaces the part of ``JobHandler`` that makes a job's answer."""
    monkeypatch.setattr(JobHandler, "_answer", answer)


def fitting_images(engine: Engine, size: int) -> int:
    """Returns how many square images of this size fit in memory, as the engine has learnt."""
    return engine._fitting_images[size, size]


def number_of_graphs(graphed: GraphedStep) -> int:
    return len(graphed._graphs)


def without_graphs(graphed: GraphedStep) -> Callable[..., Any]:
    """Returns the UNet's own forward."""
    return graphed._forward


def hang_cuda_device(cycles: int) -> None:
    """Runs a kernel that does nothing for so many clock cycles."""
    torch.cuda._sleep(cycles)
