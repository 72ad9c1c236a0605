"""The heartbeat: a process that tells the platform every few seconds that the worker is alive.

What it sends is up to the SDK (``rp_ping``, runpod 1.12.0). The SDK forks it from the worker, CUDA context included,
does not notice when it ends, and leaves it behind when the worker is killed. Here it is a fresh interpreter, which is
replaced if it ends, and ends with the worker. This module can go when the SDK does the same.
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
from runpod.http_client import SyncClientSession
from runpod.serverless import worker
from runpod.serverless.modules import rp_ping

from src.serving import log_output

RESTART_PAUSE = 5.0
LINE_INTERVAL = 60.0
"""In seconds."""

log = runpod.RunPodLogger()


def install() -> None:
    """Makes the SDK start this heartbeat instead of its own."""
    # set globally, because the SDK itself creates the memory that it shares with the heartbeat
    multiprocessing.set_start_method("spawn", force=True)
    worker.heartbeat = Heartbeat()


def release() -> None:
    """Frees what the worker shares with the process; ``os._exit`` does not, and multiprocessing would warn of it."""
    util._run_finalizers(0)  # type: ignore[attr-defined]


class Heartbeat:
    """What ``runpod.serverless.worker`` needs of ``rp_ping.Heartbeat``."""

    def start_ping(self, mirror: Any) -> None:
        """Starts the process and a thread that watches it.

        Args:
            mirror: shared memory with the ids of the jobs that the worker holds.
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
    rp_ping.SyncClientSession = _open_session
    # it would log a line for every retry
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    rp_ping.Heartbeat.process_loop(mirror)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(0)


def _open_session() -> Any:
    session = SyncClientSession()
    # no answer is read to its end: one that never ends would be the last ping
    session.stream = True
    return session


class QuietLog:
    """Stands in for the log of the SDK's heartbeat, which logs every failure; logs at most one a minute."""

    def __init__(self) -> None:
        self._logged = -LINE_INTERVAL

    def error(self, message: str) -> None:
        if time.monotonic() - self._logged > LINE_INTERVAL:
            self._logged = time.monotonic()
            log.error(message)

    def __getattr__(self, name: str) -> Any:
        return getattr(log, name)
