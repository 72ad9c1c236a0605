"""The command line of ``handler.py`` and the SDK's own environment variables, read before anything slow is imported.

``test_input`` and the arguments that begin with ``rp_`` are the SDK's, which would parse them again and know fewer log
levels.
"""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from enum import Enum, auto

from src.errors import shortened


class Mode(Enum):
    """What the process is started for."""

    PLATFORM = auto()  # to take jobs from RunPod
    POD = auto()  # to serve HTTP on a RunPod Pod, where no jobs arrive
    LOCAL_SERVER = auto()  # to serve HTTP on this machine
    ONE_JOB = auto()  # to run one job on this machine
    CHECK = auto()  # to start, and exit


LOG_LEVELS = ("ERROR", "WARN", "INFO", "DEBUG", "TRACE", "NOTSET")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line; ends the process if it is invalid or asks for help."""
    parser = argparse.ArgumentParser(
        prog="handler.py",
        usage="python handler.py [--test_input JSON | --check | --rp_serve_api] [options]",
        description="Generates the pictures that test_input.json asks for. On RunPod: takes jobs.",
        epilog="Settings are environment variables: see README.md.",
        allow_abbrev=False,
    )
    parser.add_argument("--check", action="store_true", help="start the worker, log how long each part took, and exit")
    parser.add_argument(
        "--test_input", metavar="JSON", help="""a job, '{"input": {...}}'; default: test_input.json's"""
    )
    parser.add_argument("--rp_serve_api", action="store_true", help="serve /run, /runsync and /status over HTTP")
    parser.add_argument("--rp_api_host", default="localhost", metavar="HOST", help="default: localhost")
    parser.add_argument("--rp_api_port", type=_integer(0, 65535), default=8000, metavar="PORT", help="default: 8000")
    parser.add_argument("--rp_api_concurrency", type=_integer(1, 1), default=1, metavar="1", help="no effect")
    parser.add_argument(
        "--rp_log_level",
        type=_log_level,
        metavar="LEVEL",
        help=f"one of {', '.join(LOG_LEVELS)}; default: RUNPOD_LOG_LEVEL, RUNPOD_DEBUG_LEVEL or INFO. "
        "From DEBUG on, the SDK logs prompts and pictures",
    )
    parser.add_argument("--rp_debugger", action="store_true", help="no effect")
    return parser.parse_args(arguments)


def read_environment(arguments: argparse.Namespace) -> list[str]:
    """Rewrites the variables that the SDK parses so that it can read them, and sets ``arguments``' log level.

    Returns:
        What is wrong with each invalid one. It is removed, because with it the SDK could not be imported or started.
    """
    faults = []
    for name, read in SDK_VARIABLES.items():
        if text := os.environ.pop(name, "").strip():
            try:
                os.environ[name] = str(read(text))
            except argparse.ArgumentTypeError as error:
                faults.append(f"{name}={shortened(text)}: {error}")
    levels = arguments.rp_log_level, os.environ.get("RUNPOD_LOG_LEVEL"), os.environ.get("RUNPOD_DEBUG_LEVEL")
    if level := next(filter(None, levels), None):
        os.environ["RUNPOD_LOG_LEVEL"] = arguments.rp_log_level = level
    return faults


def choose_mode(arguments: argparse.Namespace) -> Mode:
    from src.settings import on_pod, on_runpod

    if arguments.check:
        return Mode.CHECK
    if arguments.rp_serve_api:
        return Mode.LOCAL_SERVER
    if arguments.test_input is not None:
        return Mode.ONE_JOB
    if on_runpod():
        return Mode.PLATFORM
    return Mode.POD if on_pod() else Mode.ONE_JOB


def _integer(minimum: int, maximum: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (re.fullmatch("[0-9]{1,9}", text) and minimum <= int(text) <= maximum):
            raise argparse.ArgumentTypeError(f"must be an integer from {minimum} to {maximum}")
        return int(text)

    return read


def _log_level(text: str) -> str:
    level = text.strip().upper()
    level = {"WARNING": "WARN", "FATAL": "ERROR", "CRITICAL": "ERROR"}.get(level, level)
    if level not in LOG_LEVELS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(LOG_LEVELS)}")
    return level


SDK_VARIABLES: dict[str, Callable[[str], object]] = {
    "RUNPOD_LOG_LEVEL": _log_level,
    "RUNPOD_DEBUG_LEVEL": _log_level,
    # milliseconds
    "RUNPOD_PING_INTERVAL": _integer(1000, 600_000),
    "RUNPOD_REALTIME_PORT": _integer(0, 65535),
    # the SDK's server is one process
    "RUNPOD_REALTIME_CONCURRENCY": _integer(1, 1),
    "RUNPOD_GPU_TEST_TIMEOUT": _integer(1, 3600),
    "RUNPOD_GPU_MAX_ERROR_MESSAGES": _integer(0, 1000),
}
"""The environment variables that the SDK parses when it is imported or started, and how each is read."""
