"""A client of an endpoint, on RunPod or on its stand-in, as tests and benches need it."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import requests
from PIL import Image

from tests.support.platform_stub import ENDPOINT, FINAL, Platform


class Client:
    """The endpoint as its users reach it. Each thread needs a client of its own."""

    def __init__(self, platform: Platform) -> None:
        self.url = f"{platform.url}/v2/{ENDPOINT}"
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"Bearer {platform.key}"

    def get(self, path: str) -> dict[str, Any]:
        return self.session.get(f"{self.url}/{path}", timeout=60).json()

    def post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return self.session.post(f"{self.url}/{path}", json=body, timeout=120).json()

    def run(self, prompt: str = "the sea", policy: dict[str, Any] | None = None, **job_input: Any) -> str:
        body = {"input": {"prompt": prompt, "num_inference_steps": 2} | job_input, "policy": policy or {}}
        return self.post("run", body)["id"]

    def until(self, job: str, *states: str) -> dict[str, Any]:
        """The job's status as soon as it is one of ``states``."""
        return until(lambda: (answer := self.get(f"status/{job}"))["status"] in states and answer)

    def finished(self, job: str) -> dict[str, Any]:
        return self.until(job, *FINAL)

    def generate(self, prompt: str = "the sea", **job_input: Any) -> dict[str, Any]:
        return self.finished(self.run(prompt, **job_input))


def until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """What ``condition`` gives as soon as it is true.

    Raises:
        TimeoutError: if that takes longer than ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.05)
    return value


def picture(output: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(output["image"])))


def results(platform: Platform, job: str) -> list[dict[str, Any]]:
    """What workers sent as the job's result, progress left out."""
    return [post for _, post in platform.jobs[job].posts if post.get("status") != "IN_PROGRESS"]


@contextmanager
def receiver(*statuses: int) -> Iterator[tuple[str, list[tuple[float, dict[str, Any]]]]]:
    """A client's server, that answers with ``statuses`` one after the other: its address, and what it got and when."""
    received: list[tuple[float, dict[str, Any]]] = []

    class Receiver(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(statuses[len(received)])
            self.end_headers()
            received.append((time.monotonic(), json.loads(body)))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/done?token=mine", received
    finally:
        server.shutdown()
        server.server_close()
