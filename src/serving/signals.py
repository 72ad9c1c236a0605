"""Ends the process on signals until the worker loop installs its own handlers."""

import os
import signal
from types import FrameType

from src.serving.log_output import drain, exit_now


def exit_on_signals() -> None:
    """Makes SIGTERM and Ctrl-C end the process at once, unless its parent made it ignore them.

    Without handlers, process 1 of a container ignores both, because the kernel does not apply default actions to it.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    drain()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    # only process 1 gets here
    exit_now(128 + number)
