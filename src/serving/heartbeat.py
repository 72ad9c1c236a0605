"""The heartbeat: a process of its own that tells the platform every few seconds that the worker lives.

What it sends is the SDK's business (``rp_ping``, runpod 1.12.0). The SDK starts it as a copy of the worker's process,
with its CUDA context, does not notice when it ends, and leaves it behind when the worker is killed. Here it is a fresh
interpreter, which is replaced if it ends, and ends with the worker. This module can go when the SDK's own does that.
"""

import logging
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing import util
from typing import Any

import runpod
from runpod.serverless import worker
from runpod.serverless.modules import rp_ping

from src.serving import log_output

RESTART_PAUSE = 5.0
LINE_INTERVAL = 60.0
"""In seconds."""

log = runpod.RunPodLogger()


def install() -> None:
    """Has the SDK start this heartbeat in place of its own."""
    # for all processes and locks: the SDK makes the memory that it shares with the heartbeat itself
    multiprocessing.set_start_method("spawn", force=True)
    worker.heartbeat = Heartbeat()


def release() -> None:
    """Frees what the worker shares with the process; ``os._exit`` does not, and multiprocessing would warn of it."""
    util._run_finalizers(0)  # type: ignore[attr-defined]


class Heartbeat:
    """What ``runpod.serverless.worker`` needs of ``rp_ping.Heartbeat``."""

    def start_ping(self, mirror: Any) -> None:
        """Starts the process, and a thread that watches it.

        Args:
            mirror: the memory through which the process reads the ids of the jobs that the worker holds.
        """
        if os.environ.get("RUNPOD_WEBHOOK_PING"):
            threading.Thread(target=_keep_alive, args=(mirror,), daemon=True, name="heartbeat").start()


def _keep_alive(mirror: Any) -> None:
    while True:
        process = multiprocessing.Process(target=_beat, args=(mirror,), daemon=True)
        try:
            process.start()
            process.join()
            log.error(f"the heartbeat ended with exit code {process.exitcode}, starting it again")
        except OSError as error:
            log.error(f"cannot start the heartbeat, trying again: {error}")
        time.sleep(RESTART_PAUSE)


def _beat(mirror: Any) -> None:
    """Runs in the heartbeat's process."""
    # Ctrl-C reaches the worker too
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    log_output.install()
    rp_ping.log = QuietLog()
    # a line for every request that is tried again
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    rp_ping.Heartbeat.process_loop(mirror)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(0)


class QuietLog:
    """The SDK's log for its heartbeat, which logs each failure: here at most one a minute."""

    def __init__(self) -> None:
        self._logged = -LINE_INTERVAL

    def error(self, message: str) -> None:
        if time.monotonic() - self._logged > LINE_INTERVAL:
            self._logged = time.monotonic()
            log.error(message)

    def __getattr__(self, name: str) -> Any:
        return getattr(log, name)
