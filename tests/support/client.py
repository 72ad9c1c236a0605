"""A client for tests and benches, of an endpoint on RunPod or on its stand-in."""

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
    """Calls an endpoint over HTTP. Each thread needs its own client."""

    def __init__(self, platform: Platform) -> None:
        self.url = f"{platform.url}/v2/{ENDPOINT}"
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"Bearer {platform.key}"

    def get(self, path: str) -> dict[str, Any]:
        return self.session.get(f"{self.url}/{path}", timeout=60).json()

    def post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return self.session.post(f"{self.url}/{path}", json=body, timeout=120).json()

    def run(self, prompt: str = "the sea", **job_input: Any) -> str:
        return self.post("run", {"input": {"prompt": prompt, "num_inference_steps": 2} | job_input})["id"]

    def until(self, job: str, *states: str) -> dict[str, Any]:
        """Waits until the job has one of ``states``, then returns the answer of ``/status``."""
        return until(lambda: (answer := self.get(f"status/{job}"))["status"] in states and answer)

    def finished(self, job: str) -> dict[str, Any]:
        return self.until(job, *FINAL)

    def generate(self, prompt: str = "the sea", **job_input: Any) -> dict[str, Any]:
        return self.finished(self.run(prompt, **job_input))


def until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """Waits until ``condition()`` is true, then returns its value.

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
    """Returns the results that workers sent for the job, without its progress."""
    return [post for _, post in platform.jobs[job].posts if post.get("status") != "IN_PROGRESS"]


@contextmanager
def receiver() -> Iterator[tuple[str, list[Any]]]:
    """Runs a server, and yields its address and the bodies of the requests so far."""
    received: list[Any] = []

    class Receiver(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.end_headers()
            received.append(json.loads(body or "null"))

        do_GET = do_POST

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/done?token=mine", received
    finally:
        server.shutdown()
        server.server_close()
