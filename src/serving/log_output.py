"""Makes standard output and error safe to log to: writing never blocks and never fails.

The SDK prints its log. If nobody reads the other end of a pipe, ``print`` blocks as soon as the pipe is full, and the
event loop with it.
"""

import atexit
import os
import queue
import sys
import threading
from contextlib import suppress
from typing import Any, NoReturn, TextIO

MAX_LINES = 1000
"""How many lines can wait to be written. The SDK cuts its lines to 4 kB."""
LAST_SECONDS = 1.0
"""How long the process waits at its end for the last lines to be written."""


def install() -> None:
    """Makes a thread write everything that this process prints and logs.

    Must be called before anything else is opened, which would get the file descriptor of a stream that was closed
    before Python started; libraries expect all three.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115
    sys.stdout, sys.stderr = LineQueue(sys.stdout), LineQueue(sys.stderr)
    atexit.register(drain)


def drain() -> None:
    """Waits until everything is written, or for ``LAST_SECONDS`` a stream."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, LineQueue):
            stream.drain()


def exit_now(code: int) -> NoReturn:
    """Ends the process after the last lines. ``sys.exit`` would join the engine's thread, which may never return."""
    drain()
    os._exit(code)


class _Begun(threading.local):
    """What a thread has written of a line: ``print`` writes a text and its newline separately."""

    text = ""


class LineQueue:
    """A text stream whose lines a thread writes to ``stream``; if it falls behind, lines are dropped and counted.

    It takes no lock, because a signal's handler or a finalizer may interrupt one call with another.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._descriptor = stream.fileno()
        self._lines: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()
        self._begun = _Begun()
        self._dropped = 0
        threading.Thread(target=self._write_lines, daemon=True, name=f"log {stream.name}").start()

    def write(self, text: str) -> int:
        *lines, self._begun.text = (self._begun.text + text).split("\n")
        for line in lines:
            self._put(f"{line}\n")
        return len(text)

    def flush(self) -> None:
        """Writes what this thread has begun, such as a progress bar; whole lines are written anyway."""
        begun, self._begun.text = self._begun.text, ""
        if begun:
            self._put(begun)

    def drain(self) -> None:
        """Waits until everything is written, or for ``LAST_SECONDS``."""
        self.flush()
        written = threading.Event()
        self._lines.put(written)
        written.wait(LAST_SECONDS)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _put(self, line: str) -> None:
        if self._lines.qsize() >= MAX_LINES:
            self._dropped += 1
            return
        if self._dropped:
            line = f"{self._dropped} lines dropped: nobody read the log\n{line}"
            self._dropped = 0
        self._lines.put(line)

    def _write_lines(self) -> None:
        # not through the stream, whose lock would make the process exit with an error if a write never returned
        while True:
            line = self._lines.get()
            if isinstance(line, threading.Event):
                line.set()
                continue
            left = line.encode(self._stream.encoding, "backslashreplace")
            # if that fails, nobody will ever read it
            with suppress(OSError):
                while left:
                    left = left[os.write(self._descriptor, left) :]
