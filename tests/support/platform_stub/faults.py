"""Faults of the platform on demand."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from random import Random
from typing import Any, ClassVar

from aiohttp import web

RouteHandler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Fault:
    """A fault that occurs ``times`` times, at paths that contain ``path``, a regular expression."""

    path: str
    times: int = 1
    status: int | None = None
    """Answers with this status and ignores the request."""
    drop: bool = False
    """Closes the connection without an answer and ignores the request."""
    lost: bool = False
    """Carries out the request, then closes the connection without an answer."""
    text: str | None = None
    """Answers with this text, declared as JSON, and ignores the request."""
    raw: str | None = None
    """Sends this in place of an HTTP answer, and closes the connection; does what was asked only if ``lost``."""
    trickle: bool = False
    """Sends a space now and then after the answer, for ever."""
    halves: float = 0.0
    """Sends the second half of the answer so many seconds after the first."""
    location: str | None = None
    """The target of a redirect, sent with ``status``."""
    twice: bool = False
    """Hands out the next job twice."""
    delay: float = 0.0
    """Carries out the request so many seconds later."""
    body: str = ""
    """Affects only requests whose body contains this."""


class Chaos:
    """Fails requests of workers at random, the n-th to a route always in the same way.

    A job that is taken is never lost: no worker could do anything about it.
    """

    NOT_HTTP: ClassVar[dict[str, Any]] = {"raw": "<html>Bad Gateway</html>"}
    REDIRECT: ClassVar[dict[str, Any]] = {"status": 307, "location": "http://127.0.0.1:9/"}
    ANY: ClassVar[list[dict[str, Any]]] = [
        {"drop": True},
        {"status": 429},
        {"status": 500},
        {"delay": 1.0},
        NOT_HTTP,
        REDIRECT,
    ]
    KINDS: ClassVar[dict[str, list[dict[str, Any]]]] = {
        "job-take": ANY,
        "job-stop": [*ANY, {"lost": True}],
        "job-done": [*ANY, {"lost": True}, NOT_HTTP | {"lost": True}],
        "ping": [{"drop": True}, {"status": 500}, {"delay": 1.0}],
    }

    def __init__(self, seed: int, share: float) -> None:
        """``share``, from 0 to 1, of the requests fail."""
        self._seed = seed
        self._share = share
        self._routes: dict[str, Random] = {}

    def for_request(self, request: web.Request) -> Fault | None:
        for route, kinds in self.KINDS.items():
            if f"/{route}" in request.path:
                rng = self._routes.setdefault(route, Random(f"{self._seed} {route}"))
                fault = Fault(route, **rng.choice(kinds))
                return fault if rng.random() < self._share else None
        return None


class Faults(list[Fault]):
    """The faults to come, with a middleware that applies them. ``POST /faults`` adds one."""

    chaos: Chaos | None = None

    async def add(self, request: web.Request) -> web.Response:
        self.append(Fault(**await request.json()))
        return web.json_response([asdict(fault) for fault in self])

    @web.middleware
    async def misbehave(self, request: web.Request, handler: RouteHandler) -> web.StreamResponse:
        fault = await self.for_request(request)
        if fault and (fault.drop or fault.lost or fault.raw is not None):
            if fault.lost:
                await handler(request)
            if request.transport:
                if fault.raw is not None:
                    request.transport.write(fault.raw.encode("latin-1"))
                    request.transport.close()
                else:
                    request.transport.abort()
            raise asyncio.CancelledError
        if fault and fault.trickle:
            return await _trickle(request, fault.text or (await handler(request)).text)
        if fault and fault.halves:
            return await _send_in_halves(request, (await handler(request)).body, fault.halves)
        if fault and fault.text is not None:
            return web.Response(text=fault.text, content_type="application/json")
        if fault and fault.status:
            headers = {"Location": fault.location} if fault.location else None
            return web.json_response({"error": "on demand"}, status=fault.status, headers=headers)
        if fault and fault.delay:
            await asyncio.sleep(fault.delay)
        return await handler(request)

    async def for_request(self, request: web.Request) -> Fault | None:
        for fault in self:
            if fault.twice or not re.search(fault.path, request.path):
                continue
            if not fault.body or fault.body in await request.text():
                self.use_up(fault)
                return fault
        return self.chaos.for_request(request) if self.chaos else None

    def use_up(self, fault: Fault) -> None:
        fault.times -= 1
        if not fault.times:
            self.remove(fault)


async def _send_in_halves(request: web.Request, body: bytes, seconds: float) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    middle = len(body) // 2
    await response.write(body[:middle])
    await asyncio.sleep(seconds)
    await response.write(body[middle:])
    return response


async def _trickle(request: web.Request, text: str | None) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write((text or "").encode())
    while True:
        await response.write(b" ")
        await asyncio.sleep(0.05)
