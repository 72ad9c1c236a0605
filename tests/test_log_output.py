"""Writing the log where that fails. ``tests/test_platform.py`` tries a log that nobody reads."""

import os
from pathlib import Path

from src.serving.log_output import LineQueue


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
