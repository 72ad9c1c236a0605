"""The stall watch: between batches, and in a process that is frozen and continued."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from src.generation import stall_watch
from src.generation.stall_watch import StallWatch
from tests.support.pauses import Pauses
from tests.support.processes import ROOT

TIMEOUT = 1.0


def test_only_time_within_one_batch_counts(monkeypatch: pytest.MonkeyPatch):
    stalled, pauses = threading.Event(), Pauses(monkeypatch)
    watch = StallWatch(4 * stall_watch.INTERVAL, stalled.set)
    pauses.pass_by(9)
    for _ in "ab":
        with watch:
            pauses.pass_by(4)
            watch.step()
            pauses.pass_by(4)
    with watch:
        pauses.pass_by(4)
        pauses.end_one()
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
