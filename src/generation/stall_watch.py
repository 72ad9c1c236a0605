"""Notices a device that hangs."""

import threading
import time
from collections.abc import Callable

INTERVAL = 0.25
"""Between two checks, in seconds."""


class StallWatch:
    """Calls ``stalled`` from a watch thread if ``step`` is not called for ``timeout`` seconds within a block.

    The thread starts with the watch, not with a block, because a thread can no longer be started once memory or threads
    have run out. It counts its own pauses instead of reading a clock, so time in which the whole process was frozen
    (SIGSTOP, a suspended host) does not count.
    """

    def __init__(self, timeout: float, stalled: Callable[[], None]) -> None:
        self._timeout = timeout
        self._stalled = stalled
        self._in_batch = False
        self._steps = 0
        threading.Thread(target=self._watch, name="stall watch", daemon=True).start()

    def step(self) -> None:
        self._steps += 1

    def __enter__(self) -> None:
        self.step()
        self._in_batch = True

    def __exit__(self, *_: object) -> None:
        self._in_batch = False

    def _watch(self) -> None:
        pause = min(INTERVAL, self._timeout)
        seen, waited = 0, 0.0
        while waited < self._timeout:
            time.sleep(pause)
            steps = self._steps
            waited = waited + pause if self._in_batch and steps == seen else 0.0
            seen = steps
        self._stalled()
