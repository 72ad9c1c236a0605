"""The worker loop: takes jobs from the platform, runs each in a task of its own, stops them, shuts down.

It replaces ``rp_scale.JobScaler`` of runpod 1.12.0. ``runpod.serverless.start`` expects of a loop

- ``JobScaler(config).start()``;
- the id of each job in ``JobsProgress`` for as long as the worker holds it: the heartbeat tells the platform;
- a job's ``batchId`` in the log's context (``_set_batch_id``).

The SDK's loop counts a job twice while it is in its queue, then sleeps for a second, and checks only every 0.1 s for
jobs to start. With a plain handler on it, 26 queued jobs of 0.1 s take 9.7 times their work, on this loop 1.0 times,
and a job that is sent after the result of the one before waits for 770 ms, here for 1 ms: see
``python -m tests.bench.worker_loop``. This class can go when the SDK's loop does not wait, takes the good jobs of an
answer that holds a bad one, stops jobs that have not started yet, and loses no result (``delivery``).
"""

import asyncio
import json
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import runpod
from runpod.http_client import AsyncClientSession
from runpod.serverless.modules import rp_job, rp_scale
from runpod.serverless.modules.rp_logger import _set_batch_id
from runpod.serverless.modules.worker_state import JobsProgress

from src.errors import INVALID_INPUT
from src.serving import heartbeat, log_output
from src.serving.delivery import CONNECT_TIMEOUT, Outage, Refusal, Timing, deliver
from src.serving.taken_jobs import Job, read_jobs

MAX_ANSWER_BYTES = 64 * 2**20
"""The longest answer that the worker reads. RunPod's limit for one job's request is 20 MB."""
MAX_REMEMBERED = 1000
"""Ids of jobs that have ended, and of jobs that were stopped before they came."""

log = runpod.RunPodLogger()

Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


def start(handle: Handler, max_concurrency: int) -> None:
    """Hands ``handle`` to the SDK. Returns when a local server stops; on the platform, never.

    Args:
        handle: takes a job and returns its output or its ``error``.
        max_concurrency: how many jobs the worker holds at once.
    """
    rp_scale.JobScaler = WorkerLoop
    heartbeat.install()
    log_output.install()
    runpod.serverless.start({"handler": handle, "concurrency_modifier": lambda _: max_concurrency})


class WorkerLoop:
    """Holds up to ``concurrency_modifier`` jobs at once, each until its result has been delivered.

    Args:
        config: the argument of ``runpod.serverless.start``.
        timing: how long to wait for the platform.
    """

    def __init__(self, config: dict[str, Any], timing: Timing | None = None) -> None:
        self._handler = config["handler"]
        self._max_concurrency = config["concurrency_modifier"](1)
        self._timing = timing or Timing()
        self._jobs: dict[asyncio.Task[None], str] = {}
        """The id of each task's job. A job that is delivered twice has two tasks."""
        self._job_ended = asyncio.Event()
        self._ended: deque[str] = deque(maxlen=MAX_REMEMBERED)
        self._stopped_early: set[str] = set()
        self._shutting_down = asyncio.Event()
        self._exit_code = 0

    def start(self) -> None:
        """Runs until a signal or a lost device ends the worker, and then ends the process."""
        loop = asyncio.new_event_loop()
        loop.add_signal_handler(signal.SIGTERM, self._shut_down)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        loop.run_until_complete(self.run())
        heartbeat.release()
        log_output.drain()
        # Python's own exit would wait for the engine's thread, which may be in a call that never ends
        os._exit(self._exit_code)

    def _shut_down(self, exit_code: int = 0) -> None:
        self._exit_code = self._exit_code or exit_code
        self._shutting_down.set()

    def _interrupt(self) -> None:
        """Ctrl-C: shuts down, and once that is under way ends the process at once."""
        if self._shutting_down.is_set():
            os._exit(128 + signal.SIGINT)
        self._shut_down()

    async def run(self) -> None:
        """Takes and runs jobs; once it shuts down, it takes no more, and returns when all results are delivered."""
        async with AsyncClientSession() as session, asyncio.TaskGroup() as group:
            taking = group.create_task(self._take_jobs(session))
            listening = group.create_task(self._listen_for_stops(session))
            await self._shutting_down.wait()
            taking.cancel()
            while self._jobs:
                await asyncio.wait(self._jobs)
            listening.cancel()

    async def _take_jobs(self, session: aiohttp.ClientSession) -> None:
        outage = Outage("take jobs", self._timing)
        while True:
            while (free := self._max_concurrency - len(self._jobs)) <= 0:
                self._job_ended.clear()
                await self._job_ended.wait()
            for job in await self._poll(session, rp_job._job_get_url(free), read_jobs, outage):
                self._begin(session, job)

    async def _listen_for_stops(self, session: aiohttp.ClientSession) -> None:
        outage = Outage("listen for cancellations", self._timing)
        while True:
            await self._poll(session, rp_job._job_stop_url(), self._stop_jobs, outage)

    async def _poll(
        self, session: aiohttp.ClientSession, url: str, read: Callable[[bytes], Awaitable[list[Any]]], outage: Outage
    ) -> list[Any]:
        """Sends a long poll and returns what ``read`` finds in the answer.

        If it fails or there is no news, it pauses and returns an empty list.
        """
        asked, found = time.monotonic(), list[Any]()
        try:
            limits = aiohttp.ClientTimeout(self._timing.poll_timeout, sock_connect=CONNECT_TIMEOUT)
            async with session.get(url, timeout=limits, allow_redirects=False) as response:
                # 400 comes with FlashBoot, says the SDK
                if response.status not in (200, 204, 400):
                    raise Refusal(response)
                if response.status == 200 and (body := await _read(response)):
                    found = await read(body)
        except Exception as error:
            # only the time-out of the whole request is exactly this class: there was no news
            if type(error) is not TimeoutError:
                await asyncio.sleep(outage.failed(error))
                return []
        outage.succeeded()
        if not found:
            await asyncio.sleep(asked + self._timing.poll_interval - time.monotonic())
        return found

    def _begin(self, session: aiohttp.ClientSession, job: Job) -> None:
        if job.id in self._stopped_early:
            self._stopped_early.remove(job.id)
            log.info("Job stopped.", job.id)
            return
        task = asyncio.create_task(self._work(session, job))
        self._jobs[task] = job.id
        JobsProgress().add(job.id)
        # a task that is cancelled before its first step runs no code of its own
        task.add_done_callback(self._end)

    async def _work(self, session: aiohttp.ClientSession, job: Job) -> None:
        _set_batch_id(job.fields.get("batchId"))
        if job.fault:
            result = {"error": f"{INVALID_INPUT}{job.fault}"}
            log.warn("failed: invalid input", job.id)
        else:
            result = await rp_job.run_job(self._handler, job.fields)
        if result.get("stopPod"):
            self._shut_down(1)
        await deliver(session, job.id, result, self._shutting_down, self._timing)

    def _end(self, task: asyncio.Task[None]) -> None:
        job_id = self._jobs.pop(task)
        if job_id not in self._jobs.values():
            JobsProgress().remove(job_id)
        self._ended.append(job_id)
        self._job_ended.set()
        if task.cancelled():
            log.info("Job stopped.", job_id)
        elif error := task.exception():
            log.error("".join(traceback.format_exception(error)), job_id)

    async def _stop_jobs(self, answer: bytes) -> list[str]:
        """Stops the jobs that ``answer`` names; returns those that were not stopped already."""
        named = json.loads(answer).get("jobsToStop", [])
        return [job_id for job_id in named if isinstance(job_id, str) and self._stop(job_id)]

    def _stop(self, job_id: str) -> bool:
        # a second cancellation would interrupt the cleanup that the first one began
        running = [task for task, held in self._jobs.items() if held == job_id and not task.cancelling()]
        for task in running:
            task.cancel()
        known = {*self._jobs.values(), *self._ended, *self._stopped_early}
        if running or job_id in known or len(self._stopped_early) == MAX_REMEMBERED:
            return bool(running)
        # the signal has overtaken its job
        self._stopped_early.add(job_id)
        asyncio.get_running_loop().call_later(self._timing.early_stop, self._stopped_early.discard, job_id)
        return True


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """Returns the body of an answer, or as much as has come of it by the poll's time-out.

    Raises:
        ValueError: if it has more than MAX_ANSWER_BYTES, decompressed.
    """
    body = bytearray()
    try:
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > MAX_ANSWER_BYTES:
                raise ValueError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
    except TimeoutError:
        # it may hold whole jobs
        if not body:
            raise
    return bytes(body)
