"""The endpoint's routes for clients."""

from collections import Counter

from aiohttp import web

from tests.support.platform_stub.job import FINAL, Job
from tests.support.platform_stub.platform import ENDPOINT, Platform
from tests.support.platform_stub.routes import error, find_job

RUNSYNC_SECONDS = 90
"""How long ``/runsync`` waits by default."""


class ClientRoutes:
    def __init__(self, platform: Platform) -> None:
        self.platform = platform

    def routes(self) -> list[web.RouteDef]:
        base = f"/v2/{ENDPOINT}"
        return [
            web.post(f"{base}/run", self.run),
            web.post(f"{base}/runsync", self.runsync),
            web.get(f"{base}/status/{{job}}", self.status),
            web.post(f"{base}/cancel/{{job}}", self.cancel),
            web.post(f"{base}/retry/{{job}}", self.retry),
            web.post(f"{base}/purge-queue", self.purge_queue),
            web.get(f"{base}/health", self.health),
            web.route("*", f"{base}/openai{{route:/v1/.+}}", self.openai),
        ]

    async def run(self, request: web.Request) -> web.Response:
        job = await self._new_job(request)
        return web.json_response({"id": job.id, "status": job.status})

    async def runsync(self, request: web.Request) -> web.Response:
        job = await self._new_job(request)
        seconds = int(request.query.get("wait", 1000 * RUNSYNC_SECONDS)) / 1000
        await self.platform.until(lambda: job.status in FINAL, seconds)
        return web.json_response(job.public())

    async def status(self, request: web.Request) -> web.Response:
        return web.json_response(find_job(self.platform, request).public())

    async def cancel(self, request: web.Request) -> web.Response:
        job = find_job(self.platform, request)
        self.platform.end(job, "CANCELLED")
        return web.json_response({"id": job.id, "status": job.status})

    async def retry(self, request: web.Request) -> web.Response:
        job = find_job(self.platform, request)
        if job.status not in ("FAILED", "TIMED_OUT"):
            raise error(web.HTTPBadRequest, f"only a failed or timed-out job can be sent again, this is {job.status}")
        job.status, job.worker, job.started, job.finished, job.error = "IN_QUEUE", None, None, None, None
        self.platform.enqueue(job)
        return web.json_response({"id": job.id, "status": job.status})

    async def purge_queue(self, request: web.Request) -> web.Response:
        waiting = [job for job in self.platform.queue if job.status == "IN_QUEUE"]
        for job in waiting:
            self.platform.end(job, "CANCELLED")
        return web.json_response({"removed": len(waiting), "status": "completed"})

    async def health(self, request: web.Request) -> web.Response:
        count = Counter(job.status for job in self.platform.jobs.values())
        return web.json_response(
            {
                "jobs": {
                    "completed": count["COMPLETED"],
                    "failed": count["FAILED"] + count["TIMED_OUT"],
                    "inProgress": count["IN_PROGRESS"],
                    "inQueue": count["IN_QUEUE"],
                },
                "workers": self.platform.worker_states(),
            }
        )

    async def openai(self, request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else None
        call = {"openai_route": request.match_info["route"], "openai_input": body}
        job = Job.new(call, sync=True)
        self.platform.add(job)
        await self.platform.until(lambda: job.status in FINAL, RUNSYNC_SECONDS)
        if job.status != "COMPLETED":
            return web.json_response({"error": job.error or job.status}, status=400)
        is_one = isinstance(job.output, list) and len(job.output) == 1
        return web.json_response(job.output[0] if is_one else job.output)

    async def _new_job(self, request: web.Request) -> Job:
        body = await request.json()
        job = Job.new(body["input"], body.get("webhook"), sync=request.path.endswith("runsync"))
        self.platform.add(job)
        return job
