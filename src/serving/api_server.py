"""The SDK's HTTP server with /run, /runsync and /status, for your own machine and for RunPod Pods."""

import os
from typing import TYPE_CHECKING, Any

from src.api import openai

if TYPE_CHECKING:
    from src.serving.worker_loop import Handler

POD_PORT = 8000
"""The default on a Pod; ``RUNPOD_REALTIME_PORT`` overrides it."""


def serve(handle: "Handler", host: str, port: int) -> None:
    """Serves until a signal ends the process. If it cannot listen there, the server logs why and ends it."""
    from runpod.serverless.modules.rp_fastapi import WorkerAPI

    async def answer(job: dict[str, Any]) -> dict[str, Any]:
        output = await handle(job)
        # the server takes no object, and would answer 500
        return output | {"error": openai.error_text(output["error"])} if "error" in output else output

    WorkerAPI({"handler": answer}).start_uvicorn(host, port)


def serve_on_pod(handle: "Handler") -> None:
    """Serves on all of this Pod's addresses."""
    from runpod import RunPodLogger

    port = int(os.environ.get("RUNPOD_REALTIME_PORT", 0)) or POD_PORT
    RunPodLogger().info(f"this is a Pod, to which no jobs are sent: serving /run, /runsync and /status on port {port}")
    serve(handle, "0.0.0.0", port)
