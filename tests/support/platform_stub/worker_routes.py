"""The platform's routes for workers, as RunPod's SDK calls them."""

import json
import time

from aiohttp import web

from tests.support.platform_stub.platform import ENDPOINT, Platform
from tests.support.platform_stub.routes import error, find_job


class WorkerRoutes:
    def __init__(self, platform: Platform) -> None:
        self.platform = platform

    def routes(self) -> list[web.RouteDef]:
        base = f"/v2/{ENDPOINT}"
        return [
            web.get(f"{base}/job-take/{{worker}}", self.take),
            web.get(f"{base}/job-take-batch/{{worker}}", self.take_batch),
            web.get(f"{base}/job-stop/{{worker}}", self.stop),
            web.post(f"{base}/job-done/{{worker}}/{{job}}", self.done),
            web.get(f"{base}/ping/{{worker}}", self.ping),
        ]

    async def take(self, request: web.Request) -> web.Response:
        jobs = await self._take(request, 1)
        return _json(jobs[0]) if jobs else web.Response(status=204)

    async def take_batch(self, request: web.Request) -> web.Response:
        jobs = await self._take(request, int(request.query["batch_size"]))
        return _json(b"[" + b",".join(jobs) + b"]") if jobs else web.Response(status=204)

    async def stop(self, request: web.Request) -> web.Response:
        stops = self.platform.stops.setdefault(request.match_info["worker"], [])
        await self.platform.until(lambda: bool(stops), self.platform.poll_seconds)
        stopped, stops[:] = list(stops), []
        return web.json_response({"jobsToStop": stopped}) if stopped else web.Response(status=204)

    async def done(self, request: web.Request) -> web.Response:
        job, worker = find_job(self.platform, request), request.match_info["worker"]
        if not sent_by_sdk(request):
            raise error(web.HTTPBadRequest, "this is not what the SDK sends")
        result = json.loads(await request.text())
        job.posts.append((time.monotonic(), result))
        if result.get("stopPod") and worker in self.platform.workers:
            self.platform.workers[worker].to_be_replaced = True
        if job.status == "IN_PROGRESS":
            if result.get("status") == "IN_PROGRESS":
                job.output = result["output"]
            else:
                self.platform.end(job, "FAILED" if "error" in result else "COMPLETED", result)
        return web.json_response({})

    async def ping(self, request: web.Request) -> web.Response:
        if worker := self.platform.workers.get(request.match_info["worker"]):
            worker.pings.append(dict(request.query))
        return web.json_response({})

    async def _take(self, request: web.Request, most: int) -> list[bytes]:
        worker, platform = request.match_info["worker"], self.platform
        await platform.until(lambda: bool(platform.queue) and worker not in platform.throttled, platform.poll_seconds)
        if worker in platform.throttled:
            return []
        jobs, platform.queue[:most] = platform.queue[:most], []
        for job in jobs:
            if job.status == "IN_QUEUE":
                platform.begin(job, worker)
        if jobs:
            platform.handed_out.append(len(jobs))
        if jobs and (fault := next((fault for fault in platform.faults if fault.twice), None)):
            platform.faults.use_up(fault)
            platform.queue[:0] = jobs
        return [job.for_worker() for job in jobs]


def sent_by_sdk(request: web.Request) -> bool:
    """Whether a result has the query and the headers that the SDK's own have."""
    wanted = {"Content-Type": "application/x-www-form-urlencoded", "charset": "utf-8"}
    return (
        request.query.get("isStream") == "false"
        and "X-Request-ID" in request.headers
        and all(request.headers.get(name) == value for name, value in wanted.items())
    )


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")
