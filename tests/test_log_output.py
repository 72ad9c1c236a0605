"""Writing the log where that fails. ``tests/test_platform.py`` tries a log that nobody reads."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import pytest

import handler
from src.serving import log_output
from src.serving.log_output import LineQueue
from tests.support.client import Client
from tests.support.platform_stub import HANDLER, serving


@contextmanager
def failing_output(how: str) -> Iterator[IO[bytes]]:
    """An output that cannot be written."""
    read, output = os.pipe()
    if how == "full disk":
        output = os.open("/dev/full", os.O_WRONLY)
    elif how == "closed pipe":
        os.close(read)
    else:
        os.set_blocking(output, False)
        with suppress(BlockingIOError):
            while True:
                os.write(output, bytes(4096))
        os.set_blocking(output, True)
    with os.fdopen(output, "wb", buffering=0) as file:
        yield file


def test_log_goes_on_once_a_full_disk_has_room_again(tmp_path: Path):
    log = tmp_path / "log"
    with Path("/dev/full").open("w") as stream, log.open("wb") as file:
        lines = LineQueue(stream)
        lines.write("before\n")
        lines.drain()
        os.dup2(file.fileno(), stream.fileno())
        lines.write("after\n")
        lines.drain()
    assert log.read_text().endswith("after\n")


def test_lines_that_threads_print_at_once_stay_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(log_output, "MAX_LINES", 100_000)
    log = tmp_path / "log"
    with log.open("w") as stream:
        lines = LineQueue(stream)
        lines.write("the main thread has begun a line ")

        def print_lines(name: str) -> None:
            for i in range(5000):
                print(name, i, file=lines)

        threads = [threading.Thread(target=print_lines, args=name) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        lines.write("and ended it")
        lines.drain()
    *printed, last = log.read_text().splitlines()
    assert sorted(printed) == sorted(f"{name} {i}" for name in "ab" for i in range(5000))
    assert last == "the main thread has begun a line and ended it"


def test_characters_that_the_log_cannot_encode_are_escaped(tmp_path: Path):
    log = tmp_path / "log"
    with log.open("w", encoding="ascii") as stream:
        lines = LineQueue(stream)
        lines.write("pictures in /山/\udcff\n")
        lines.drain()
    assert log.read_text() == "pictures in /\\u5c71/\\udcff\n"


@pytest.mark.process
@pytest.mark.parametrize("how", ["full disk", "unread pipe"])
def test_local_run_ends_although_its_output_fails(tmp_path: Path, how: str):
    command = [sys.executable, HANDLER, "--test_input", '{"input": {"prompt": "sea", "num_inference_steps": 1}}']
    with failing_output(how) as output:
        ran = subprocess.run(command, cwd=tmp_path, timeout=120, stdout=output, stderr=output)
    assert ran.returncode == 0
    assert (tmp_path / "picture.png").exists()


@pytest.mark.process
@pytest.mark.parametrize("how", ["full disk", "closed pipe", "unread pipe"])
def test_refused_start_answers_jobs_although_its_output_fails(how: str):
    with serving() as platform, failing_output(how) as log:
        worker = platform.workers[platform.start_worker(handler.main, log=log, MODEL_ID="/nowhere")].process
        done = Client(platform).generate()
        assert done["error"] == "this endpoint cannot start: MODEL_ID=/nowhere: no such file or directory"
        assert worker.poll() is None
