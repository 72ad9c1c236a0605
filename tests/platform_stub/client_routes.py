"""The endpoint's routes as its clients call them."""

import json
from collections import Counter

from aiohttp import web

from tests.platform_stub.job import FINAL, Job
from tests.platform_stub.platform import ENDPOINT, Platform
from tests.platform_stub.routes import error, find_job


class ClientRoutes:
    def __init__(self, platform: Platform) -> None:
        self.platform = platform

    def routes(self) -> list[web.RouteDef]:
        base = f"/v2/{ENDPOINT}"
        return [
            web.post(f"{base}/run", self.run),
            web.post(f"{base}/runsync", self.runsync),
            web.get(f"{base}/status/{{job}}", self.status),
            web.get(f"{base}/stream/{{job}}", self.stream),
            web.post(f"{base}/cancel/{{job}}", self.cancel),
            web.post(f"{base}/retry/{{job}}", self.retry),
            web.post(f"{base}/purge-queue", self.purge_queue),
            web.get(f"{base}/health", self.health),
        ]

    async def run(self, request: web.Request) -> web.Response:
        job = await self._new_job(request)
        return web.json_response({"id": job.id, "status": job.status})

    async def runsync(self, request: web.Request) -> web.Response:
        job = await self._new_job(request)
        wait = float(request.query.get("wait", 90_000)) / 1000
        await self.platform.until(lambda: job.status in FINAL, wait)
        return web.json_response(job.public())

    async def status(self, request: web.Request) -> web.Response:
        return web.json_response(find_job(self.platform, request).public())

    async def stream(self, request: web.Request) -> web.Response:
        job = find_job(self.platform, request)
        told, job.stream = job.stream, []
        return web.json_response({"status": job.status, "stream": told})

    async def cancel(self, request: web.Request) -> web.Response:
        self.platform.end(find_job(self.platform, request), "CANCELLED")
        return web.json_response({"id": request.match_info["job"], "status": find_job(self.platform, request).status})

    async def retry(self, request: web.Request) -> web.Response:
        job = find_job(self.platform, request)
        if job.status not in ("FAILED", "TIMED_OUT"):
            raise error(web.HTTPBadRequest, f"only a failed or timed-out job can be sent again, this is {job.status}")
        job.status, job.worker, job.started, job.finished, job.error = "IN_QUEUE", None, None, None, None
        job.retries += 1
        self.platform.enqueue(job)
        return web.json_response({"id": job.id, "status": job.status})

    async def purge_queue(self, request: web.Request) -> web.Response:
        waiting = [job for job in self.platform.queue if job.status == "IN_QUEUE"]
        for job in waiting:
            self.platform.end(job, "CANCELLED")
        return web.json_response({"removed": len(waiting), "status": "completed"})

    async def health(self, request: web.Request) -> web.Response:
        count = Counter(job.status for job in self.platform.jobs.values())
        busy = {job.worker for job in self.platform.jobs.values() if job.status == "IN_PROGRESS"}
        alive = [name for name, worker in self.platform.workers.items() if worker.process.poll() is None]
        ready = [name for name in alive if self.platform.workers[name].pings]
        return web.json_response(
            {
                "jobs": {
                    "completed": count["COMPLETED"],
                    "failed": count["FAILED"] + count["TIMED_OUT"],
                    "inProgress": count["IN_PROGRESS"],
                    "inQueue": count["IN_QUEUE"],
                    "retried": sum(job.retries for job in self.platform.jobs.values()),
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

    async def _new_job(self, request: web.Request) -> Job:
        try:
            body = await request.json()
            job_input = body["input"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise error(web.HTTPBadRequest, 'the body must be JSON: {"input": {...}}') from None
        timeout = body.get("policy", {}).get("executionTimeout")
        sync = request.path.endswith("runsync")
        job = Job(job_input, sync, execution_timeout=timeout / 1000 if timeout else None)
        self.platform.jobs[job.id] = job
        self.platform.enqueue(job)
        return job
