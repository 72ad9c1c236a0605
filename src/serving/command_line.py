"""The command line of ``handler.py``, read before anything slow is imported.

``test_input`` and the arguments that begin with ``rp_`` belong to RunPod's SDK, which parses them again itself.
"""

import argparse
import json
import os
from collections.abc import Sequence
from enum import Enum, auto
from typing import Any


class Mode(Enum):
    """What the process is started for."""

    PLATFORM = auto()
    """To take jobs from RunPod."""
    POD = auto()
    """To serve HTTP on a RunPod Pod, where no jobs arrive."""
    LOCAL_SERVER = auto()
    """To serve HTTP on this machine."""
    ONE_JOB = auto()
    """To run one job on this machine."""
    CHECK = auto()
    """To start, and exit."""


LOG_LEVELS = ("ERROR", "WARN", "INFO", "DEBUG", "TRACE", "NOTSET")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line; ends the process if it is invalid or asks for help."""
    return _parser().parse_args(arguments)


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="handler.py",
        usage="python handler.py [--test_input JSON | --check | --rp_serve_api] [options]",
        description="Generates the pictures that test_input.json asks for. On RunPod: takes jobs.",
        epilog="Settings are environment variables: see README.md.",
        allow_abbrev=False,
    )
    parser.add_argument("--check", action="store_true", help="start the worker, log how long each part took, and exit")
    parser.add_argument(
        "--test_input", type=_json, metavar="JSON", help="""a job in place of test_input.json: '{"input": {...}}'"""
    )
    parser.add_argument("--rp_serve_api", action="store_true", help="serve /run, /runsync and /status over HTTP")
    parser.add_argument("--rp_api_host", default="localhost", metavar="HOST", help="default: localhost")
    parser.add_argument("--rp_api_port", type=_port, default=8000, metavar="PORT", help="default: 8000")
    parser.add_argument(
        "--rp_api_concurrency", type=int, choices=[1], default=1, metavar="1", help="the SDK's server is one process"
    )
    parser.add_argument(
        "--rp_log_level",
        type=_log_level,
        default=os.environ.get("RUNPOD_LOG_LEVEL") or os.environ.get("RUNPOD_DEBUG_LEVEL"),
        metavar="LEVEL",
        help=f"one of {', '.join(LOG_LEVELS)}; default: RUNPOD_LOG_LEVEL, RUNPOD_DEBUG_LEVEL or INFO. "
        "From DEBUG on, the SDK logs prompts and pictures",
    )
    parser.add_argument("--rp_debugger", action="store_true", help="add the SDK's own measurements to results")
    return parser


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to {2**16 - 1}, got {text}")
    return int(text)


def _log_level(text: str) -> str:
    if text.upper() not in LOG_LEVELS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(LOG_LEVELS)}, got {text}")
    return text.upper()
