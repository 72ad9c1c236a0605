"""Programs in forks of a process that has imported the libraries, for tests in which the imports are not the point.

A fork starts in 0.1 s. Environment variables that libraries read at import have no effect in it, but for those of
huggingface_hub and RunPod's SDK, which are read again.
"""

import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import huggingface_hub

import handler
from src.serving import log_output
from tests.support.processes import ROOT, users_environment

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.support.preloaded"])


class Fork:
    """``main(*arguments)`` in a fork, with what tests use of a ``subprocess.Popen``, in a session of its own."""

    _turns = threading.Lock()
    """Two threads must not read the same exit status."""

    def __init__(
        self,
        main: Callable[..., object],
        *arguments: str,
        env: dict[str, str],
        cwd: Path = ROOT,
        stdout: IO[bytes] | None = None,
        stderr: IO[bytes] | None = None,
    ) -> None:
        # a connection's file descriptor is handed over when it is pickled
        outputs = [
            Connection(os.dup(file.fileno() if file else 1), readable=False) for file in (stdout, stderr or stdout)
        ]
        self._process = CONTEXT.Process(target=_enter, args=(outputs, cwd, env, main, arguments))
        with self._turns:
            self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        with self._turns:
            return self._process.exitcode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a fork", timeout)
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


Process = Fork | subprocess.Popen[bytes]


def python(code: str, **environment: str) -> str:
    """Runs ``code`` and returns what it prints."""
    ran = run(Fork, _execute, code, env=os.environ | environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def run_module(module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m module`` with ``arguments``."""
    return run(Fork, _run_module, module, *arguments, env=os.environ | environment)


def run_handler(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``handler.py`` with ``arguments`` in ``folder``."""
    return run(Fork, call_handler, *arguments, cwd=folder, env=users_environment() | environment)


def run(start: Callable[..., Process], *arguments: Any, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Runs what ``start`` starts, given ``arguments``, ``settings`` and the files for its outputs."""
    with TemporaryFile() as stdout, TemporaryFile() as stderr:
        process = start(*arguments, stdout=stdout, stderr=stderr, **settings)
        try:
            code = process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(arguments, code, text_of(stdout), text_of(stderr))


def text_of(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


def _enter(
    outputs: list[Connection], folder: Path, environment: dict[str, str], main: Callable[..., object], arguments: Any
) -> None:
    os.setsid()
    for descriptor, output in enumerate(outputs, 1):
        os.dup2(output.fileno(), descriptor)
        output.close()
    # multiprocessing ignores a module that it cannot preload
    assert "tests.support.preloaded" in sys.modules
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    importlib.reload(huggingface_hub.constants)
    for name in [name for name in sys.modules if name.partition(".")[0] == "runpod"]:
        del sys.modules[name]
    sys.argv = ["main"]
    try:
        main(*arguments)
    finally:
        # multiprocessing ends its processes without atexit
        log_output.drain()


def _execute(code: str) -> None:
    exec(code, {})


def _run_module(module: str, *arguments: str) -> None:
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_script(path: str, *arguments: str) -> None:
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def call_handler(*arguments: str) -> None:
    sys.argv = ["handler.py", *arguments]
    handler.main()
