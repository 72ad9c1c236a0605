"""The pauses of a stall watch, which end when a test says so."""

import threading
import time
from types import SimpleNamespace

import pytest

from src.generation import stall_watch


class Pauses:
    """Replaces the sleep of the one watch that is started next. Those of other tests' engines go on sleeping."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._others = threading.enumerate()
        self._begun, self._ended = threading.Semaphore(0), threading.Semaphore(0)
        monkeypatch.setattr(stall_watch, "time", SimpleNamespace(sleep=self._sleep))

    def _sleep(self, seconds: float) -> None:
        if threading.current_thread() in self._others:
            time.sleep(seconds)
        else:
            self._begun.release()
            self._ended.acquire(timeout=10)

    def end_one(self) -> None:
        """Ends the pause that the watch is in, or will be in."""
        assert self._begun.acquire(timeout=10)
        self._ended.release()

    def pass_by(self, number: int) -> None:
        """Ends as many pauses, one after the other; returns when the watch has begun the next one."""
        for _ in range(number):
            self.end_one()
            assert self._begun.acquire(timeout=10)
            self._begun.release()
