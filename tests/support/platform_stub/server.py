"""The platform's HTTP server."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from aiohttp import web

from tests.support.platform_stub.client_routes import ClientRoutes
from tests.support.platform_stub.faults import RouteHandler
from tests.support.platform_stub.platform import Platform
from tests.support.platform_stub.routes import error
from tests.support.platform_stub.worker_routes import WorkerRoutes


def application(platform: Platform) -> web.Application:
    @web.middleware
    async def authorize(request: web.Request, handler: RouteHandler) -> web.StreamResponse:
        if request.headers.get("Authorization", "").removeprefix("Bearer ") != platform.key:
            raise error(web.HTTPUnauthorized, "unauthorized")
        return await handler(request)

    application = web.Application(middlewares=[platform.faults.misbehave, authorize], client_max_size=2**26)
    application.add_routes(ClientRoutes(platform).routes() + WorkerRoutes(platform).routes())
    application.add_routes([web.post("/faults", platform.faults.add)])
    return application


async def serve(platform: Platform, port: int, ready: Callable[[], None]) -> None:
    platform.loop = asyncio.get_running_loop()
    # a worker that has hung up must not get a job
    runner = web.AppRunner(application(platform), handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    platform.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        ready()
        await platform.watch_workers()
    finally:
        for task in platform.background:
            task.cancel()
        await runner.cleanup()


@contextmanager
def serving(port: int = 0, **settings: Any) -> Iterator[Platform]:
    """Serves a platform from its own thread while the block runs. Its workers end with it.

    Args:
        port: 0 chooses a free one.
        settings: those of ``Platform``.

    Raises:
        OSError: if the port is taken.
    """
    platform, ready, loop = Platform(**settings), threading.Event(), asyncio.new_event_loop()
    server = loop.create_task(serve(platform, port, ready.set))

    def run() -> None:
        with suppress(asyncio.CancelledError, OSError):
            loop.run_until_complete(server)
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while not ready.wait(0.1):
        if server.done():
            server.result()
    try:
        yield platform
    finally:
        platform.stop_workers()
        loop.call_soon_threadsafe(server.cancel)
        thread.join(10)
