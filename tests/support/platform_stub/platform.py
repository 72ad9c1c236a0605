"""The platform's state: jobs, their queue, and the processes that work on them."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import aiohttp

from tests.support.platform_stub.faults import Faults
from tests.support.platform_stub.job import FINAL, Job

if TYPE_CHECKING:
    from tests.support.forks import Process

Command = list[str] | Callable[[], object]
"""How a worker starts: as a program, or, for tests in which its imports are not the point, as a function in a fork."""
HANDLER = Path(__file__).parents[3] / "handler.py"
PROGRAM = [sys.executable, str(HANDLER)]
ENDPOINT = "local"
WATCH_INTERVAL = 0.2
"""Seconds between two checks that the workers' processes are alive."""


@dataclass
class WorkerProcess:
    process: "Process"
    environment: dict[str, str]
    command: Command
    pings: list[dict[str, str]] = field(default_factory=list)
    to_be_replaced: bool = False


class Platform:
    """The platform's state. Everything but ``start_worker`` happens in one event loop, ``loop``.

    Args:
        key: the API key that clients and workers must send.
        poll_seconds: how long a worker's long poll for jobs or stop signals waits.
    """

    def __init__(self, key: str = "local", poll_seconds: float = 5.0) -> None:
        self.key = key
        self.poll_seconds = poll_seconds
        self.url = ""
        self.jobs: dict[str, Job] = {}
        self.workers: dict[str, WorkerProcess] = {}
        self.faults = Faults()
        self.queue: list[Job] = []
        self.stops: dict[str, list[str]] = {}
        self.handed_out: list[int] = []
        """The number of jobs in each answer to a worker that held any."""
        self.throttled: set[str] = set()
        """The names of workers that get no jobs, as if their host had no free GPU."""
        self.background: set[asyncio.Task[None]] = set()
        self.loop: asyncio.AbstractEventLoop
        self._changed = asyncio.Event()

    def add(self, job: Job) -> None:
        """Accepts a new job."""
        self.jobs[job.id] = job
        self.enqueue(job)

    def enqueue(self, job: Job) -> None:
        self.queue.append(job)
        self.notify()

    def begin(self, job: Job, worker: str) -> None:
        job.status, job.worker, job.started = "IN_PROGRESS", worker, time.monotonic()

    def end(self, job: Job, status: str, result: dict[str, Any] | None = None) -> None:
        """Sets the final state of ``job``, and sends a stop signal if a worker is still working on it."""
        if job.status in FINAL:
            return
        if status in ("CANCELLED", "TIMED_OUT") and job.status == "IN_PROGRESS":
            self.stops.setdefault(str(job.worker), []).append(job.id)
        self.queue = [waiting for waiting in self.queue if waiting is not job]
        result = result or {}
        job.status, job.output, job.error = status, result.get("output"), result.get("error")
        job.finished = time.monotonic()
        if job.webhook and status in ("COMPLETED", "FAILED"):
            task = self.loop.create_task(_post(job.webhook, job.public()))
            self.background.add(task)
            task.add_done_callback(self.background.discard)
        self.notify()

    def notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def until(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition() and (left := deadline - time.monotonic()) > 0:
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except TimeoutError:
                return

    def start_worker(self, command: Command = PROGRAM, log: IO[bytes] | None = None, **settings: str) -> str:
        """Starts ``handler.py``, or another ``command``, as a worker of this platform, and returns its id."""
        name = f"worker-{len(self.workers) + 1}"
        base = f"{self.url}/v2/{ENDPOINT}"
        environment = {
            "MODEL_ID": "demo",
            "RUNPOD_POD_ID": name,
            "RUNPOD_ENDPOINT_ID": ENDPOINT,
            "RUNPOD_AI_API_KEY": self.key,
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID",
            "RUNPOD_PING_INTERVAL": "1000",
        } | settings
        options: dict[str, Any] = {"env": os.environ | environment, "cwd": HANDLER.parent, "stdout": log, "stderr": log}
        if callable(command):
            from tests.support.forks import Fork

            process: Process = Fork(command, **options)
        else:
            process = subprocess.Popen(command, start_new_session=True, **options)
        self.workers[name] = WorkerProcess(process, settings, command)
        return name

    def busy(self) -> bool:
        """Whether any job has not reached its final state."""
        return any(job.status not in FINAL for job in self.jobs.values())

    def worker_states(self) -> dict[str, int]:
        """Returns the number of workers in each state, as ``/health`` does; here, living workers are ready."""
        states = dict.fromkeys(("idle", "initializing", "running", "throttled", "unhealthy"), 0)
        return states | {"ready": sum(worker.process.poll() is None for worker in self.workers.values())}

    async def watch_workers(self) -> None:
        """Ends the jobs of workers that died, and replaces workers that asked for it."""
        seen_dead = set()
        while True:
            await asyncio.sleep(WATCH_INTERVAL)
            for name, worker in list(self.workers.items()):
                if name in seen_dead or worker.process.poll() is None:
                    continue
                seen_dead.add(name)
                for job in self.jobs.values():
                    if job.worker == name and job.status == "IN_PROGRESS":
                        self.end(job, "TIMED_OUT", {"error": "the worker was lost"})
                if worker.to_be_replaced:
                    self.start_worker(worker.command, **worker.environment)

    def kill_worker(self, name: str) -> None:
        """Kills a worker, as a failure of its host would."""
        with suppress(ProcessLookupError):
            os.killpg(self.workers[name].process.pid, signal.SIGKILL)

    def stop_workers(self) -> None:
        """Ends all workers, and gives them 30 s to deliver their results."""
        for worker in self.workers.values():
            worker.process.terminate()
        for name, worker in self.workers.items():
            with suppress(subprocess.TimeoutExpired):
                worker.process.wait(30)
            self.kill_worker(name)


async def _post(url: str, body: dict[str, Any]) -> None:
    async with aiohttp.ClientSession() as session, session.post(url, json=body):
        pass
