"""The endpoint's routes for clients."""

from collections import Counter
from typing import TypeVar

from aiohttp import web
from pydantic import BaseModel, ValidationError

from tests.support.platform_stub.job import FINAL, MAX_RUN_BYTES, MAX_RUNSYNC_BYTES, Job, JobRequest, RunsyncQuery
from tests.support.platform_stub.platform import ENDPOINT, Platform
from tests.support.platform_stub.routes import error, find_job

Model = TypeVar("Model", bound=BaseModel)


class ClientRoutes:
    def __init__(self, platform: Platform) -> None:
        self.platform = platform

    def routes(self) -> list[web.RouteDef]:
        base = f"/v2/{ENDPOINT}"
        return [
            web.post(f"{base}/run", self.run),
            web.post(f"{base}/runsync", self.runsync),
            web.get(f"{base}/status/{{job}}", self.status),
            web.get(f"{base}/status-sync/{{job}}", self.status_sync),
            web.get(f"{base}/stream/{{job}}", self.stream),
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
        query = _validated(RunsyncQuery, dict(request.query))
        job = await self._new_job(request)
        await self.platform.until(lambda: job.status in FINAL, self.platform.seconds(query.wait))
        return web.json_response(job.public())

    async def status(self, request: web.Request) -> web.Response:
        return web.json_response(find_job(self.platform, request).public())

    async def status_sync(self, request: web.Request) -> web.Response:
        query, job = _validated(RunsyncQuery, dict(request.query)), find_job(self.platform, request)
        await self.platform.until(lambda: job.status in FINAL, self.platform.seconds(query.wait))
        return web.json_response(job.public())

    async def stream(self, request: web.Request) -> web.Response:
        job = find_job(self.platform, request)
        chunks, job.stream = job.stream, []
        return web.json_response({"status": job.status, "stream": chunks})

    async def cancel(self, request: web.Request) -> web.Response:
        job = find_job(self.platform, request)
        self.platform.end(job, "CANCELLED")
        return web.json_response({"id": job.id, "status": job.status})

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
        return web.json_response(
            {
                "jobs": {
                    "completed": count["COMPLETED"],
                    "failed": count["FAILED"] + count["TIMED_OUT"],
                    "inProgress": count["IN_PROGRESS"],
                    "inQueue": count["IN_QUEUE"],
                    "retried": sum(job.retries for job in self.platform.jobs.values()),
                },
                "workers": self.platform.worker_states(),
            }
        )

    async def openai(self, request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else None
        call = {"openai_route": request.match_info["route"], "openai_input": body}
        job = Job.new(JobRequest(input=call), sync=True)
        self.platform.add(job)
        await self.platform.until(lambda: job.status in FINAL, self.platform.seconds(RunsyncQuery().wait))
        if job.status != "COMPLETED":
            return web.json_response({"error": job.error or job.status}, status=400)
        is_one = isinstance(job.output, list) and len(job.output) == 1
        return web.json_response(job.output[0] if is_one else job.output)

    async def _new_job(self, request: web.Request) -> Job:
        sync = request.path.endswith("runsync")
        limit = MAX_RUNSYNC_BYTES if sync else MAX_RUN_BYTES
        size = len(await request.read())
        if size > limit:
            raise web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=size)
        try:
            body = await request.json()
        except ValueError:
            raise error(web.HTTPBadRequest, 'the body must be JSON: {"input": {...}}') from None
        job = Job.new(_validated(JobRequest, body), sync=sync)
        self.platform.add(job)
        return job


def _validated(kind: type[Model], value: object) -> Model:
    try:
        return kind.model_validate(value)
    except ValidationError as invalid:
        reasons = [": ".join([*map(str, reason["loc"]), reason["msg"]]) for reason in invalid.errors()]
        raise error(web.HTTPBadRequest, "; ".join(reasons)) from None
