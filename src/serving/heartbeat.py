"""The heartbeat: tells the platform every few seconds that the worker is alive, and which jobs it holds.

The SDK (runpod 1.12.0) runs ``rp_ping.Heartbeat.ping_loop`` in a process that it forks from the worker, CUDA context
included. That process is missed by nobody when it ends, and outlives a worker that is killed. Here the same loop runs
in a thread: pictures are made, and their files encoded, outside of Python's lock. This module can go when the SDK's
heartbeat is a thread too, and reads no endless answer.
"""

import logging
import os
import threading
from typing import Any

import runpod
from runpod.serverless import worker
from runpod.serverless.modules import rp_ping, worker_state

from src.serving.delivery import Outage, Timing


def install() -> None:
    """Makes the SDK start this heartbeat instead of its own."""
    worker.heartbeat = Heartbeat()
    worker_state.PingJobMirror = JobIds
    # it would log a line for every retry
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


class JobIds:
    """Stands in for the SDK's ``PingJobMirror``, which needs memory that processes share: a host may have none."""

    _ids: str | None = None

    def set(self, ids: str | None) -> None:
        self._ids = ids

    def get(self) -> str | None:
        return self._ids


class Heartbeat(rp_ping.Heartbeat):  # type: ignore[misc]
    """The SDK's heartbeat, in a thread."""

    def __init__(self) -> None:
        super().__init__()
        self._outage = Outage("send the heartbeat", Timing())

    def start_ping(self, mirror: Any = None, test: bool = False) -> None:
        if os.environ.get("RUNPOD_WEBHOOK_PING"):
            self._mirror = mirror
            threading.Thread(target=self.ping_loop, args=(test,), daemon=True, name="heartbeat").start()

    def _send_ping(self) -> None:
        query = {"job_id": self._mirror.get(), "runpod_version": runpod.__version__}
        timeout = 2 * self.PING_INTERVAL
        try:
            # no answer is read, not even a redirect's: one that never ends would be the last ping
            self._session.get(self.PING_URL, params=query, timeout=timeout, stream=True, allow_redirects=False).close()
        except Exception as error:
            self._outage.failed(error)
        else:
            self._outage.succeeded()
