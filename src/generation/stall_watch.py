"""Notices a device that hangs."""

import threading
import time
from collections.abc import Callable
from typing import Self


class StallWatch:
    """Calls ``stalled`` from a thread of its own if ``step`` is not called for ``timeout`` seconds within the block."""

    def __init__(self, timeout: float, stalled: Callable[[], None]) -> None:
        self._timeout = timeout
        self._stalled = stalled
        self._exited = threading.Event()
        self._last_step = time.monotonic()

    def step(self) -> None:
        self._last_step = time.monotonic()

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, name="stall watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._exited.set()

    def _watch(self) -> None:
        while (remaining := self._last_step + self._timeout - time.monotonic()) > 0:
            if self._exited.wait(remaining):
                return
        if not self._exited.is_set():
            self._stalled()
