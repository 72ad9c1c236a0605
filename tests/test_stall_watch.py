"""The stall watch: between batches, and in a process that is frozen and continued."""

import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from src.generation import stall_watch
from src.generation.stall_watch import StallWatch
from tests.support.processes import ROOT

TIMEOUT = 1.0


def test_only_time_within_one_batch_counts(monkeypatch: pytest.MonkeyPatch):
    stalled, ended, next_one = threading.Event(), threading.Semaphore(0), threading.Semaphore(0)

    def sleep(_: float) -> None:
        ended.release()
        next_one.acquire(timeout=10)

    def pass_time(intervals: int) -> None:
        for _ in range(intervals):
            next_one.release()
            assert ended.acquire(timeout=10)

    monkeypatch.setattr(stall_watch, "time", SimpleNamespace(sleep=sleep))
    watch = StallWatch(4 * stall_watch.INTERVAL, stalled.set)
    assert ended.acquire(timeout=10)
    pass_time(9)
    for _ in "ab":
        with watch:
            pass_time(4)
            watch.step()
            pass_time(4)
    with watch:
        pass_time(4)
        next_one.release()
        assert stalled.wait(10)


@pytest.mark.process
def test_time_during_which_the_process_is_frozen_does_not_count():
    code = f"""
from src.generation.stall_watch import StallWatch

watch = StallWatch({TIMEOUT}, lambda: print("stalled", flush=True))
with watch:
    print("watching", flush=True)
    input()
"""
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == "watching\n"
        process.send_signal(signal.SIGSTOP)
        # frozen for longer than the time-out
        time.sleep(2 * TIMEOUT)
        thawed = time.monotonic()
        process.send_signal(signal.SIGCONT)
        assert process.stdout.readline() == "stalled\n"
        assert time.monotonic() - thawed > TIMEOUT / 2
        process.communicate("\n")
