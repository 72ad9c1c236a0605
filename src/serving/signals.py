"""How the process ends when it is told to."""

import os
import signal
from types import FrameType


def exit_on_signals() -> None:
    """Ends the process at once on SIGTERM and Ctrl-C, unless its parent had it ignore them.

    As process 1 of a container it would otherwise ignore both: the kernel drops their default action there.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    # only process 1 gets here. sys.exit() would join the engine's thread, which may never return
    os._exit(128 + number)
