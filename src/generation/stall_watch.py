"""Notices a device that hangs."""

import threading
from collections.abc import Callable
from typing import Self

INTERVAL = 0.25
"""Between two checks, in seconds."""


class StallWatch:
    """Calls ``stalled`` from a thread of its own if ``step`` is not called for ``timeout`` seconds within the block.

    It counts its own pauses instead of reading a clock, so time in which the whole process was frozen (SIGSTOP, a
    suspended host) does not count.
    """

    def __init__(self, timeout: float, stalled: Callable[[], None]) -> None:
        self._timeout = timeout
        self._stalled = stalled
        self._exited = threading.Event()
        self._steps = 0

    def step(self) -> None:
        self._steps += 1

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, name="stall watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._exited.set()

    def _watch(self) -> None:
        pause = min(INTERVAL, self._timeout)
        seen, waited = 0, 0.0
        while waited < self._timeout:
            if self._exited.wait(pause):
                return
            steps = self._steps
            waited = waited + pause if steps == seen else 0.0
            seen = steps
        self._stalled()
