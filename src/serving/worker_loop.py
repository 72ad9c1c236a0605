"""The worker loop: takes jobs from the platform, runs each in a task of its own, stops them, shuts down.

It replaces ``rp_scale.JobScaler`` of runpod 1.12.0. ``runpod.serverless.start`` expects of a loop
``JobScaler(config).start()``, the id of each job in ``JobsProgress`` for as long as the worker holds it, for the
heartbeat, and the job's ``batchId`` in the log's context (``_set_batch_id``).

The SDK's loop counts a job twice while it is in its queue, then sleeps for a second, and checks only every 0.1 s for
jobs to start: 26 queued jobs of 0.1 s take 9.7 times their work there and 1.0 times here, and a job that is sent after
the result of the one before waits for 770 ms there and for 1 ms here (``python -m tests.bench.worker_loop``). This
class can go when the SDK's loop does not wait, takes the good jobs of an answer that holds a bad one, stops jobs that
have not started yet, and loses no result (``delivery``).
"""

import asyncio
import json
import os
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

import aiohttp
import runpod
from runpod.http_client import AsyncClientSession
from runpod.serverless.modules import rp_job, rp_scale
from runpod.serverless.modules.rp_logger import _set_batch_id
from runpod.serverless.modules.worker_state import JobsProgress

from src.errors import InvalidInput
from src.serving import heartbeat
from src.serving.delivery import CONNECT_TIMEOUT, Outage, Rejected, Timing, deliver
from src.serving.log_output import exit_now
from src.serving.taken_jobs import MAX_JOBS, Job, read_body, read_jobs
from src.threads import start_pool

THREADS = 32  # for asyncio.to_thread and looking up hosts: asyncio's own maximum
MAX_REMEMBERED = 1000  # ids of jobs that were answered, and of jobs that were stopped before they came

log = runpod.RunPodLogger()

Handler = Callable[[dict[str, Any]], Coroutine[Any, Any, dict[str, Any]]]


def serve(handle: Handler, max_concurrency: int) -> None:
    """Has the SDK call ``handle`` for each job that RunPod sends; never returns."""
    rp_scale.JobScaler = WorkerLoop
    heartbeat.install()
    runpod.serverless.start({"handler": handle, "concurrency_modifier": lambda _: max_concurrency})


class WorkerLoop:
    """Holds up to ``concurrency_modifier`` jobs at once, each until its result has been delivered."""

    def __init__(self, config: dict[str, Any], timing: Timing | None = None) -> None:
        self._handler = config["handler"]
        self._max_concurrency = config["concurrency_modifier"](1)
        self._timing = timing or Timing()
        self._jobs: dict[asyncio.Task[None], str] = {}  # their ids; a job that is delivered twice has two tasks
        self._answered: deque[str] = deque(maxlen=MAX_REMEMBERED)  # without an error: others may be sent again
        self._stopped_early: dict[str, float] = {}  # until when a stop signal that has overtaken its job counts
        self._reading = asyncio.Lock()  # held while an answer with jobs arrives
        self._shutting_down = asyncio.Event()
        self._exit_code = 0

    def start(self) -> None:
        """Runs until a signal or a lost device ends the worker, and then ends the process."""
        loop = asyncio.new_event_loop()
        loop.set_default_executor(start_pool(THREADS, "job"))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._shutting_down.set)
        loop.run_until_complete(self.run())
        exit_now(self._exit_code)

    async def run(self) -> None:
        """Takes and runs jobs; once it shuts down, it takes no more, and returns when all results are delivered."""
        async with AsyncClientSession() as self._session, asyncio.TaskGroup() as group:
            taking = group.create_task(self._take_jobs())
            listening = group.create_task(self._listen_for_stops())
            await self._shutting_down.wait()
            # a second Ctrl-C waits for nothing
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, os._exit, 128 + signal.SIGINT)
            async with self._reading:
                taking.cancel()
            while self._jobs:
                await asyncio.wait(self._jobs)
            listening.cancel()

    async def _take_jobs(self) -> None:
        outage = Outage("take jobs", self._timing)
        while True:
            while (free := self._max_concurrency - len(self._jobs)) <= 0:
                await asyncio.wait(self._jobs, return_when=asyncio.FIRST_COMPLETED)
            await self._poll(rp_job._job_get_url(min(free, MAX_JOBS)), self._begin_jobs, outage, self._reading)

    async def _listen_for_stops(self) -> None:
        if not (url := rp_job._job_stop_url()):
            log.warn("the platform has no address for cancellations: jobs that are cancelled run to their end")
            return
        outage = Outage("listen for cancellations", self._timing)
        while True:
            await self._poll(url, self._stop_jobs, outage, nullcontext())

    async def _poll(
        self,
        url: str,
        act: Callable[[bytearray], Awaitable[bool]],
        outage: Outage,
        reading: AbstractAsyncContextManager[object],
    ) -> None:
        """Sends a long poll and has ``act`` act on the answer; pauses unless it says that another may wait.

        ``reading`` is held from the first byte of an answer until ``act`` is done.
        """
        asked, found = time.monotonic(), False
        try:
            limits = aiohttp.ClientTimeout(sock_connect=CONNECT_TIMEOUT)
            async with asyncio.timeout(self._timing.poll_timeout):
                response = await self._session.get(url, timeout=limits, allow_redirects=False)
            async with response, reading:
                if response.status not in (200, 204, 400):  # 400 comes with FlashBoot, says the SDK
                    raise Rejected(response)
                if response.status == 200 and (body := await read_body(response, self._timing.transfer_timeout)):
                    found = await act(body)
                outage.succeeded()
        except Exception as error:
            # only the time-out of the poll is exactly this class: there was no news
            if type(error) is not TimeoutError:
                return await asyncio.sleep(outage.failed(error))
        if not found:
            await asyncio.sleep(asked + self._timing.poll_interval - time.monotonic())

    async def _begin_jobs(self, answer: bytearray) -> bool:
        jobs = await read_jobs(answer)
        for job in jobs:
            self._begin(job)
        return bool(jobs)

    def _begin(self, job: Job) -> None:
        task = asyncio.create_task(self._work(job), name=job.id)
        self._jobs[task] = job.id
        JobsProgress().add(job.id)
        task.add_done_callback(self._end)  # a task that is cancelled before its first step runs no code of its own
        if self._stopped_early.pop(job.id, 0) > time.monotonic():
            task.cancel()

    async def _work(self, job: Job) -> None:
        _set_batch_id(job.fields.get("batchId"))
        if job.fault:
            result = {"error": str(InvalidInput(job.fault))}
            log.warn("failed: invalid input", job.id)
        else:
            result = await rp_job.run_job(self._handler, job.fields)
        if result.get("stopPod"):
            self._exit_code = 1
            self._shutting_down.set()
        await deliver(self._session, job.id, result, self._shutting_down, self._timing)
        if "error" not in result:
            self._answered.append(job.id)

    def _end(self, task: asyncio.Task[None]) -> None:
        job_id = self._jobs.pop(task)
        if job_id not in self._jobs.values():
            JobsProgress().remove(job_id)
        if task.cancelled():
            log.info("Job stopped.", job_id)

    async def _stop_jobs(self, answer: bytearray) -> bool:
        """Stops the jobs that ``answer`` names, if any. The next poll may wait its time."""
        match json.loads(answer):
            case {"jobsToStop": [*named]}:
                job_ids = [job_id for job_id in named if isinstance(job_id, str)]
            case _:
                job_ids = []
        for job_id in job_ids:
            for task, held in self._jobs.items():
                # a second cancellation would interrupt the cleanup that the first one began
                if held == job_id and not task.cancelling():
                    task.cancel()
            if job_id not in self._jobs.values() and job_id not in self._answered:
                self._stopped_early[job_id] = time.monotonic() + self._timing.early_stop
                if len(self._stopped_early) > MAX_REMEMBERED:
                    del self._stopped_early[next(iter(self._stopped_early))]
        return False
