"""Programs in forks of a process that has imported the libraries, for tests in which the imports are not the point.

A fork starts in 0.1 s. Environment variables that libraries read at import have no effect in it, but for those of
huggingface_hub, which are read again.
"""

import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import huggingface_hub

import handler
from src.serving import log_output
from tests.support.processes import ROOT, users_environment

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.support.preloaded"])


def python(code: str, **environment: str) -> str:
    """Runs ``code`` and returns what it prints."""
    ran = _run(ROOT, os.environ | environment, _execute, code)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def run_module(module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m module`` with ``arguments``."""
    return _run(ROOT, os.environ | environment, _run_as_main, module, *arguments)


def run_handler(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``handler.py`` with ``arguments`` in ``folder``."""
    return _run(folder, users_environment() | environment, _call_handler, *arguments)


def _run(
    folder: Path, environment: dict[str, str], function: Callable[..., None], *arguments: str
) -> subprocess.CompletedProcess[str]:
    with TemporaryDirectory() as written:
        outputs = Path(written, "stdout"), Path(written, "stderr")
        process = CONTEXT.Process(target=_enter, args=(outputs, folder, environment, function, arguments))
        process.start()
        process.join(120)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError
        return subprocess.CompletedProcess(arguments, process.exitcode, *(each.read_text() for each in outputs))


def _enter(
    outputs: tuple[Path, Path], folder: Path, environment: dict[str, str], function: Callable[..., Any], arguments: Any
) -> None:
    for descriptor, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    # multiprocessing ignores a module that it cannot preload
    assert "tests.support.preloaded" in sys.modules
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    importlib.reload(huggingface_hub.constants)
    function(*arguments)


def _execute(code: str) -> None:
    exec(code, {})


def _run_as_main(module: str, *arguments: str) -> None:
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _call_handler(*arguments: str) -> None:
    sys.argv = ["handler.py", *arguments]
    try:
        handler.main()
    finally:
        # multiprocessing ends its processes without atexit
        log_output.drain()
