"""A stand-in for RunPod's platform on this machine: real workers in real processes, driven by real clients.

``python -m tests.platform_stub --workers 1`` serves ``/v2/local/run``, ``/runsync``, ``/status/{id}``,
``/cancel/{id}``, ``/retry/{id}`` and ``/health`` on port 8000, with the key ``local``, and starts workers on it.
It can be told to misbehave: see ``Fault``.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

RouteHandler = Callable[[web.Request], Awaitable[web.StreamResponse]]

HANDLER = Path(__file__).parents[1] / "handler.py"
ENDPOINT = "local"
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")
MAX_RUN_BYTES, MAX_RUNSYNC_BYTES = 10_000_000, 20_000_000
LOST_AFTER = 0.2
"""Seconds between two looks at whether the workers' processes live."""


@dataclass
class Job:
    """A job as the platform keeps it; ``posts`` holds all that workers sent for it, in order, with the time."""

    input: Any
    sync: bool = False
    execution_timeout: float | None = None
    id: str = field(default_factory=lambda: f"{uuid.uuid4()}-local")
    status: str = "IN_QUEUE"
    output: Any = None
    error: str | None = None
    worker: str | None = None
    created: float = field(default_factory=time.monotonic)
    started: float | None = None
    finished: float | None = None
    retries: int = 0
    posts: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    stream: list[dict[str, Any]] = field(default_factory=list)

    def public(self) -> dict[str, Any]:
        """What ``/status`` tells."""
        told = {"id": self.id, "status": self.status}
        if self.started:
            told["delayTime"] = round(1000 * (self.started - self.created))
            told["workerId"] = self.worker
        if self.started and self.finished:
            told["executionTime"] = round(1000 * (self.finished - self.started))
        return told | {
            name: value for name, value in (("output", self.output), ("error", self.error)) if value is not None
        }


@dataclass
class Fault:
    """What the platform does wrong ``times`` times, at paths that have ``path`` (a regular expression) in them."""

    path: str
    times: int = 1
    status: int | None = None
    """Answers with this status instead of doing what was asked."""
    drop: bool = False
    """Closes the connection without an answer, without doing what was asked."""
    twice: bool = False
    """Hands out the next job that is taken once more."""
    delay: float = 0.0
    """Does what was asked only so many seconds later."""
    body: str = ""
    """Only if the request's body has this in it."""


@dataclass
class WorkerProcess:
    process: subprocess.Popen[bytes]
    environment: dict[str, str]
    command: list[str]
    pings: list[dict[str, str]] = field(default_factory=list)
    to_be_replaced: bool = False


class Platform:
    """The platform's state. Everything but ``start_worker`` happens in one event loop."""

    def __init__(self, key: str = "local", poll_seconds: float = 5.0) -> None:
        self.key = key
        self.poll_seconds = poll_seconds
        self.url = ""
        self.jobs: dict[str, Job] = {}
        self.workers: dict[str, WorkerProcess] = {}
        self.faults: list[Fault] = []
        self._queue: list[Job] = []
        self._stops: dict[str, list[str]] = {}
        self._changed = asyncio.Event()

    # the client's side

    async def run(self, request: web.Request) -> web.Response:
        job = await self._new_job(request)
        return web.json_response({"id": job.id, "status": job.status})

    async def runsync(self, request: web.Request) -> web.Response:
        job = await self._new_job(request)
        wait = float(request.query.get("wait", 90_000)) / 1000
        await self._until(lambda: job.status in FINAL, wait)
        return web.json_response(job.public())

    async def status(self, request: web.Request) -> web.Response:
        return web.json_response(self._job(request).public())

    async def stream(self, request: web.Request) -> web.Response:
        job = self._job(request)
        told, job.stream = job.stream, []
        return web.json_response({"status": job.status, "stream": told})

    async def cancel(self, request: web.Request) -> web.Response:
        self._end(self._job(request), "CANCELLED")
        return web.json_response({"id": request.match_info["job"], "status": self._job(request).status})

    async def retry(self, request: web.Request) -> web.Response:
        job = self._job(request)
        if job.status not in ("FAILED", "TIMED_OUT"):
            raise _error(web.HTTPBadRequest, f"only a failed or timed-out job can be sent again, this is {job.status}")
        job.status, job.worker, job.started, job.finished, job.error = "IN_QUEUE", None, None, None, None
        job.retries += 1
        self._enqueue(job)
        return web.json_response({"id": job.id, "status": job.status})

    async def purge_queue(self, request: web.Request) -> web.Response:
        waiting = [job for job in self._queue if job.status == "IN_QUEUE"]
        for job in waiting:
            self._end(job, "CANCELLED")
        return web.json_response({"removed": len(waiting), "status": "completed"})

    async def health(self, request: web.Request) -> web.Response:
        count = Counter(job.status for job in self.jobs.values())
        busy = {job.worker for job in self.jobs.values() if job.status == "IN_PROGRESS"}
        alive = [name for name, worker in self.workers.items() if worker.process.poll() is None]
        ready = [name for name in alive if self.workers[name].pings]
        return web.json_response(
            {
                "jobs": {
                    "completed": count["COMPLETED"],
                    "failed": count["FAILED"] + count["TIMED_OUT"],
                    "inProgress": count["IN_PROGRESS"],
                    "inQueue": count["IN_QUEUE"],
                    "retried": sum(job.retries for job in self.jobs.values()),
                },
                "workers": {
                    "idle": len(set(ready) - busy),
                    "initializing": len(alive) - len(ready),
                    "ready": len(ready),
                    "running": len(set(ready) & busy),
                    "throttled": 0,
                    "unhealthy": 0,
                },
            }
        )

    async def add_fault(self, request: web.Request) -> web.Response:
        self.faults.append(Fault(**await request.json()))
        return web.json_response([asdict(fault) for fault in self.faults])

    # the worker's side

    async def take(self, request: web.Request) -> web.Response:
        jobs = await self._take(request, 1)
        return web.json_response(jobs[0]) if jobs else web.Response(status=204)

    async def take_batch(self, request: web.Request) -> web.Response:
        jobs = await self._take(request, int(request.query["batch_size"]))
        return web.json_response(jobs) if jobs else web.Response(status=204)

    async def stop(self, request: web.Request) -> web.Response:
        stops = self._stops.setdefault(request.match_info["worker"], [])
        await self._until(lambda: bool(stops), self.poll_seconds)
        told, stops[:] = list(stops), []
        return web.json_response({"jobsToStop": told}) if told else web.Response(status=204)

    async def done(self, request: web.Request) -> web.Response:
        body = await request.text()
        job, worker, result = self._job(request), request.match_info["worker"], json.loads(body)
        if len(body) > (MAX_RUNSYNC_BYTES if job.sync else MAX_RUN_BYTES):
            raise _error(web.HTTPBadRequest, "the result is over the limit")
        job.posts.append((time.monotonic(), result))
        if result.get("stopPod") and worker in self.workers:
            self.workers[worker].to_be_replaced = True
        if job.status == "IN_PROGRESS":
            if result.get("status") == "IN_PROGRESS":
                job.output = result["output"]
            else:
                self._end(job, "FAILED" if "error" in result else "COMPLETED", result)
        return web.json_response({})

    async def done_in_part(self, request: web.Request) -> web.Response:
        self._job(request).stream.append(json.loads(await request.text()))
        return web.json_response({})

    async def ping(self, request: web.Request) -> web.Response:
        if worker := self.workers.get(request.match_info["worker"]):
            worker.pings.append(dict(request.query))
        return web.json_response({})

    # how it works

    def application(self) -> web.Application:
        application = web.Application(middlewares=[self._misbehave, self._authorize], client_max_size=2**26)
        base = f"/v2/{ENDPOINT}"
        application.add_routes(
            [
                web.post(f"{base}/run", self.run),
                web.post(f"{base}/runsync", self.runsync),
                web.get(f"{base}/status/{{job}}", self.status),
                web.get(f"{base}/stream/{{job}}", self.stream),
                web.post(f"{base}/cancel/{{job}}", self.cancel),
                web.post(f"{base}/retry/{{job}}", self.retry),
                web.post(f"{base}/purge-queue", self.purge_queue),
                web.get(f"{base}/health", self.health),
                web.post("/faults", self.add_fault),
                web.get(f"{base}/job-take/{{worker}}", self.take),
                web.get(f"{base}/job-take-batch/{{worker}}", self.take_batch),
                web.get(f"{base}/job-stop/{{worker}}", self.stop),
                web.post(f"{base}/job-done/{{worker}}/{{job}}", self.done),
                web.post(f"{base}/job-stream/{{worker}}/{{job}}", self.done_in_part),
                web.get(f"{base}/ping/{{worker}}", self.ping),
            ]
        )
        return application

    def start_worker(self, command: list[str] | None = None, **settings: str) -> str:
        """Starts ``handler.py``, or another ``command``, as a worker of this platform, and gives its id."""
        name = f"worker-{len(self.workers) + 1}"
        base = f"{self.url}/v2/{ENDPOINT}"
        environment = {
            "MODEL_ID": "demo",
            "RUNPOD_POD_ID": name,
            "RUNPOD_ENDPOINT_ID": ENDPOINT,
            "RUNPOD_AI_API_KEY": self.key,
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID",
            "RUNPOD_PING_INTERVAL": "2000",
        } | settings
        command = command or [sys.executable, str(HANDLER)]
        process = subprocess.Popen(command, env=os.environ | environment, cwd=HANDLER.parent, start_new_session=True)
        self.workers[name] = WorkerProcess(process, settings, command)
        return name

    def busy(self) -> bool:
        """Whether any job has not reached its final state."""
        return any(job.status not in FINAL for job in self.jobs.values())

    async def watch_workers(self) -> None:
        """Ends the jobs of workers that died, and replaces workers that asked for it."""
        seen_dead = set()
        while True:
            await asyncio.sleep(LOST_AFTER)
            for name, worker in list(self.workers.items()):
                if name in seen_dead or worker.process.poll() is None:
                    continue
                seen_dead.add(name)
                for job in self.jobs.values():
                    if job.worker == name and job.status == "IN_PROGRESS":
                        self._end(job, "TIMED_OUT", {"error": "the worker was lost"})
                if worker.to_be_replaced:
                    self.start_worker(worker.command, **worker.environment)

    def kill_worker(self, name: str) -> None:
        """Ends a worker at once, as its host's failure would: its heartbeat, a process of its own, dies with it."""
        with suppress(ProcessLookupError):
            os.killpg(self.workers[name].process.pid, signal.SIGKILL)

    def stop_workers(self) -> None:
        """Ends all workers, and gives them half a minute to deliver what they hold."""
        for worker in self.workers.values():
            worker.process.terminate()
        for name, worker in self.workers.items():
            with suppress(subprocess.TimeoutExpired):
                worker.process.wait(30)
            self.kill_worker(name)

    @web.middleware
    async def _authorize(self, request: web.Request, handler: RouteHandler) -> web.StreamResponse:
        if request.headers.get("Authorization", "").removeprefix("Bearer ") != self.key:
            raise _error(web.HTTPUnauthorized, "unauthorized")
        return await handler(request)

    @web.middleware
    async def _misbehave(self, request: web.Request, handler: RouteHandler) -> web.StreamResponse:
        fault = await self._fault_for(request)
        if fault and fault.drop:
            assert request.transport
            request.transport.abort()
            raise asyncio.CancelledError
        if fault and fault.status:
            return web.json_response({"error": "told to"}, status=fault.status)
        if fault and fault.delay:
            await asyncio.sleep(fault.delay)
        return await handler(request)

    async def _fault_for(self, request: web.Request) -> Fault | None:
        for fault in self.faults:
            if fault.twice or not re.search(fault.path, request.path):
                continue
            if not fault.body or fault.body in await request.text():
                self._use_up(fault)
                return fault
        return None

    def _use_up(self, fault: Fault) -> None:
        fault.times -= 1
        if not fault.times:
            self.faults.remove(fault)

    async def _new_job(self, request: web.Request) -> Job:
        try:
            body = await request.json()
            job_input = body["input"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise _error(web.HTTPBadRequest, 'the body must be JSON: {"input": {...}}') from None
        timeout = body.get("policy", {}).get("executionTimeout")
        sync = request.path.endswith("runsync")
        job = Job(job_input, sync, execution_timeout=timeout / 1000 if timeout else None)
        self.jobs[job.id] = job
        self._enqueue(job)
        return job

    def _job(self, request: web.Request) -> Job:
        job = self.jobs.get(request.match_info["job"])
        if not job:
            raise _error(web.HTTPNotFound, "job not found")
        return job

    async def _take(self, request: web.Request, most: int) -> list[dict[str, Any]]:
        await self._until(lambda: bool(self._queue), self.poll_seconds)
        jobs, self._queue[:most] = self._queue[:most], []
        for job in jobs:
            if job.status != "IN_QUEUE":
                continue
            job.status, job.worker, job.started = "IN_PROGRESS", request.match_info["worker"], time.monotonic()
            if job.execution_timeout:
                asyncio.get_running_loop().call_later(
                    job.execution_timeout, self._end, job, "TIMED_OUT", {"error": "job timed out"}
                )
        if jobs and (fault := next((fault for fault in self.faults if fault.twice), None)):
            self._use_up(fault)
            self._queue[:0] = jobs
        return [{"id": job.id, "input": job.input} for job in jobs]

    def _enqueue(self, job: Job) -> None:
        self._queue.append(job)
        self._notify()

    def _end(self, job: Job, status: str, result: dict[str, Any] | None = None) -> None:
        """Gives ``job`` its final state, and its worker a stop signal if it still works on it."""
        if job.status in FINAL:
            return
        if job.status == "IN_PROGRESS" and status in ("CANCELLED", "TIMED_OUT"):
            self._stops.setdefault(str(job.worker), []).append(job.id)
        result = result or {}
        job.status, job.output, job.error = status, result.get("output"), result.get("error")
        job.finished = time.monotonic()
        self._queue = [waiting for waiting in self._queue if waiting is not job]
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _until(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition() and (left := deadline - time.monotonic()) > 0:
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except TimeoutError:
                return


def _error(kind: type[web.HTTPError], said: str) -> web.HTTPError:
    return kind(text=json.dumps({"error": said}), content_type="application/json")


async def _serve(platform: Platform, port: int, ready: Callable[[], None]) -> None:
    # a taker that hangs up must not be given a job
    runner = web.AppRunner(platform.application(), handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    platform.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        ready()
        await platform.watch_workers()
    finally:
        await runner.cleanup()


@contextmanager
def serving(**settings: Any) -> Iterator[Platform]:
    """A platform on a free port in a thread of its own, for as long as the block runs; its workers end with it."""
    platform, ready, loop = Platform(**settings), threading.Event(), asyncio.new_event_loop()
    server = loop.create_task(_serve(platform, 0, ready.set))

    def run() -> None:
        try:
            loop.run_until_complete(server)
        except asyncio.CancelledError:
            loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield platform
    finally:
        platform.stop_workers()
        loop.call_soon_threadsafe(server.cancel)
        thread.join(10)


def main() -> None:
    parser = argparse.ArgumentParser(description="A local RunPod: point curl or Postman at it.")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--key", default="local", help="the API key that clients must send")
    arguments = parser.parse_args()
    platform = Platform(arguments.key)

    def ready() -> None:
        for _ in range(arguments.workers):
            platform.start_worker()
        print(
            f"serving {platform.url}/v2/{ENDPOINT}/run with the key {arguments.key!r}, for example:\n"
            f"  curl {platform.url}/v2/{ENDPOINT}/runsync -H 'Authorization: Bearer {arguments.key}' "
            """-d '{"input": {"prompt": "the ocean at dusk"}}'""",
            flush=True,
        )

    try:
        asyncio.run(_serve(platform, arguments.port, ready))
    except KeyboardInterrupt:
        print("stopping")
    finally:
        platform.stop_workers()


if __name__ == "__main__":
    main()
