"""The stall watch in a process that is frozen and continued."""

import signal
import subprocess
import sys
import time

import pytest

from tests.support.processes import ROOT

TIMEOUT = 1.0


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
