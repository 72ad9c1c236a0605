"""Makes standard output and error safe to log to: writing never blocks, and survives a closed pipe.

The SDK prints its log. If nobody reads the other end of a pipe, ``print`` blocks as soon as the pipe is full, and the
event loop with it.
"""

import atexit
import logging
import os
import queue
import sys
import threading
from typing import Any, TextIO

MAX_LINES = 1000
"""How many lines can wait to be written. The SDK cuts its lines to 4 kB."""
LAST_SECONDS = 1.0
"""How long the process waits at its end for the last lines to be written."""


def open_closed_streams() -> None:
    """Opens standard streams that were closed before Python started, because libraries expect all three.

    Must be called before anything else is opened, which would get the file descriptor of a standard stream.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            # for the heartbeat's process
            os.set_inheritable(null, True)
            setattr(sys, name, open(null, mode))  # noqa: PTH123, SIM115


def install() -> None:
    """Makes a thread write everything that this process prints and logs."""
    for name in ("stdout", "stderr"):
        before = getattr(sys, name)
        if not isinstance(before, LineQueue):
            after = LineQueue(before)
            setattr(sys, name, after)
            _redirect_loggers(before, after)
            atexit.register(after.drain)


def drain() -> None:
    """Waits for the last lines, for use before ``os._exit``, which does not."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, LineQueue):
            stream.drain()


def _redirect_loggers(before: TextIO, after: "LineQueue") -> None:
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", []):
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                handler.setStream(after)


class LineQueue:
    """A text stream whose lines a thread writes to ``stream``; those that find it behind are dropped and counted."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lines: queue.Queue[str] = queue.Queue(MAX_LINES)
        self._lock = threading.Lock()
        self._begun = ""
        self._dropped = 0
        threading.Thread(target=self._write_lines, daemon=True, name=f"log {stream.name}").start()

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._begun = (self._begun + text).split("\n")
            for line in lines:
                self._put(f"{line}\n")
        return len(text)

    def flush(self) -> None:
        """Does nothing: each line is flushed when it is written."""

    def drain(self) -> None:
        """Waits until all lines are written, or for ``LAST_SECONDS``."""
        with self._lines.all_tasks_done:
            self._lines.all_tasks_done.wait_for(lambda: not self._lines.unfinished_tasks, LAST_SECONDS)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _put(self, line: str) -> None:
        if self._dropped:
            line = f"{self._dropped} lines dropped: nobody read the log\n{line}"
        try:
            self._lines.put_nowait(line)
            self._dropped = 0
        except queue.Full:
            self._dropped += 1

    def _write_lines(self) -> None:
        while True:
            line = self._lines.get()
            try:
                self._stream.write(line)
                self._stream.flush()
            except (OSError, ValueError):
                # nobody will ever read it
                pass
            self._lines.task_done()
