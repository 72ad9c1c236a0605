"""Functions shared by the routes for clients and workers."""

import json

from aiohttp import web

from tests.support.platform_stub.job import Job
from tests.support.platform_stub.platform import Platform


def find_job(platform: Platform, request: web.Request) -> Job:
    job = platform.jobs.get(request.match_info["job"])
    if not job:
        raise error(web.HTTPNotFound, "job not found")
    return job


def error(kind: type[web.HTTPError], said: str) -> web.HTTPError:
    return kind(text=json.dumps({"error": said}), content_type="application/json")
