"""The program as a user runs it: one job, the local server over HTTP, starts that fail."""

import ast
import fcntl
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support import forks
from tests.support.client import until
from tests.support.forks import Fork
from tests.support.platform_stub import HANDLER
from tests.support.processes import run_handler

pytestmark = pytest.mark.process

BASELINES_PROMPT = "A double-black diamond mountain to ski on near Seattle."


def refused_to_start(ran: subprocess.CompletedProcess[str], said: str) -> None:
    assert ran.returncode == 1
    (line,) = ran.stdout.splitlines()
    assert line.startswith(f"ERROR  | the worker cannot start: {said}")
    assert ran.stderr == ""


def test_command_without_arguments_runs_the_test_input(tmp_path: Path):
    (tmp_path / "test_input.json").write_text((HANDLER.parent / "test_input.json").read_text())
    ran = run_handler(tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    *log, line = ran.stdout.splitlines()
    path = tmp_path / "picture.png"
    seed = re.fullmatch(rf"{path}: seed (\d+), 128 x 128, \d+\.\d s", line)[1]
    assert f"Seed: {seed}," in Image.open(path).text["parameters"]
    assert log[-1].startswith("INFO   | ready: ") and max(map(len, log)) < 200
    assert ran.stderr == ""
    generated = Image.open(path)
    assert generated.size == (128, 128)
    assert generated.text["parameters"].startswith(
        f"{BASELINES_PROMPT}\nSteps: 50, Sampler: DDIM, CFG scale: 7.5, Seed: "
    )
    assert "model: demo, embedded" in ran.stdout


def job(**job_input: object) -> dict[str, Any]:
    return {"input": {"prompt": "sea", "num_inference_steps": 2} | job_input}


def test_several_pictures_are_numbered_and_their_result_is_logged_on_demand_whatever_the_locale(tmp_path: Path):
    asked = json.dumps(job(num_images=2, output_format="webp", seed=7, prompt="the sea 山 " * 80), ensure_ascii=False)
    c_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ran = run_handler(tmp_path, "--test_input", asked, RUNPOD_DEBUG_LEVEL=" info", **c_locale)
    assert ran.returncode == 0
    first, second, warning = ran.stdout.splitlines()[-3:]
    assert first.startswith(f"{tmp_path}/picture-1.webp: seed 7, 128 x 128, ")
    assert second.startswith(f"{tmp_path}/picture-2.webp: seed 8, 128 x 128, ")
    assert warning.startswith("warning: prompt: longer than 77 tokens") and r"the sea \u5c71" in warning
    assert {Image.open(path).format for path in tmp_path.glob("picture-[12].webp")} == {"WEBP"}
    assert "INFO   | Job result: {" in ran.stdout


def failure(ran: subprocess.CompletedProcess[str]) -> str:
    """The error with which a job failed: one line after those of the start."""
    assert ran.returncode == 1
    assert ran.stderr == ""
    *log, line = ran.stdout.splitlines()
    assert {each[:6] for each in log} == {"INFO  "}
    return line.removeprefix("ERROR  | Job local_test failed with error: ")


def test_bad_job_fails_with_one_line(tmp_path: Path):
    ran = forks.run_handler(tmp_path, "--test_input", '{"input": {"promt": "sea"}}')
    assert failure(ran) == "invalid input: prompt: required; promt: unknown field, did you mean prompt?"
    (tmp_path / "picture.png").mkdir()
    ran = forks.run_handler(tmp_path, "--test_input", json.dumps(job()))
    assert failure(ran) == f"cannot write {tmp_path / 'picture.png'}: Is a directory"


def test_progress_bar_is_shown_on_a_terminal(tmp_path: Path):
    terminal, its_end = pty.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with os.fdopen(its_end, "wb", buffering=0) as stderr, (tmp_path / "log").open("wb") as stdout:
        arguments = ["--test_input", json.dumps(job(num_inference_steps=60))]
        fork = Fork(forks.call_handler, *arguments, cwd=tmp_path, env=dict(os.environ), stdout=stdout, stderr=stderr)
        assert fork.wait(120) == 0
    drawn = b""
    # reading fails at the end of what was written
    with suppress(OSError):
        while piece := os.read(terminal, 4096):
            drawn += piece
    os.close(terminal)
    steps = [int(step) for step in re.findall(rb"(\d+)/60 ", drawn)]
    assert len(set(steps)) > 2 and steps == sorted(steps)
    # the bar is removed before the picture is reported
    assert drawn.split(b"\r")[-2].strip() == b""
    assert "picture.png: seed" in (tmp_path / "log").read_text()


def test_call_of_openai_s_route_prints_its_answer_or_why_it_failed(tmp_path: Path):
    call = {"openai_route": "/v1/images/generations", "openai_input": {"prompt": "sea", "num_inference_steps": 1}}
    ran = forks.run_handler(tmp_path, "--test_input", json.dumps({"id": [1], "input": call}))
    assert json.loads(ran.stdout.splitlines()[-1])["size"] == "128x128"
    ran = forks.run_handler(tmp_path, "--test_input", json.dumps({"input": call | {"openai_input": {}}}))
    assert failure(ran) == "invalid input: prompt: required"


BAD_JOBS = [
    (b'{"input": ', "cannot read {source}: Expecting value: line 1 column 11 (char 10)"),
    (b"\x80", "cannot read {source}: 'utf-8' codec can't decode byte 0x80"),
    (b"[" * 100_000, "cannot read {source}: maximum recursion depth exceeded"),
    (b'{"prompt": "sea"}', '{source} must be a job such as {{"input": {{"prompt": "..."}}}}'),
    (b"[1]", "{source} must be a job such as "),
]


@pytest.mark.parametrize(("job", "said"), BAD_JOBS, ids=range(len(BAD_JOBS)))
def test_invalid_test_input_is_refused_before_the_start(tmp_path: Path, job: bytes, said: str):
    refused_to_start(forks.run_handler(tmp_path, "--test_input", os.fsdecode(job)), said.format(source="--test_input"))
    (tmp_path / "test_input.json").write_bytes(job)
    refused_to_start(forks.run_handler(tmp_path), said.format(source="test_input.json"))


def test_missing_test_input_is_refused_before_the_start(tmp_path: Path):
    refused_to_start(forks.run_handler(tmp_path), f"there is no test_input.json in {tmp_path}, and no --test_input")


def test_local_server_says_why_it_cannot_listen(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ran = forks.run_handler(tmp_path, "--rp_serve_api", "--rp_api_port", port, "--rp_api_host", "127.0.0.1")
    assert ran.returncode
    assert "address already in use" in ran.stderr and "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--chek"], "unrecognized arguments: --chek"),
        (["--rp_serve"], "unrecognized arguments: --rp_serve"),
        (["a red star"], "unrecognized arguments: a red star"),
        (["--rp_api_port", "80000"], "argument --rp_api_port: must be an integer from 0 to 65535"),
        (["--rp_log_level", "loud"], "argument --rp_log_level: must be one of ERROR, WARN, "),
    ],
)
def test_invalid_arguments_are_refused(tmp_path: Path, arguments: list[str], said: str):
    ran = forks.run_handler(tmp_path, *arguments)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.splitlines()[-1].startswith(f"handler.py: error: {said}")


@pytest.mark.parametrize("library", ["pydantic_core", "libtorch_python"])
def test_interrupt_during_the_start_ends_it_without_a_traceback(tmp_path: Path, library: str):
    process = subprocess.Popen(
        [sys.executable, HANDLER, "--check"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    # interrupted when it has begun to load this library
    until(lambda: library in Path(f"/proc/{process.pid}/maps").read_text())
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in said


def test_interrupt_during_a_job_ends_it_at_once():
    code = f"""
import asyncio, os, signal
from src.serving.one_job import run_job
from src.serving.signals import exit_on_signals

async def interrupted(job):
    os.kill(os.getpid(), signal.SIGINT)
    await asyncio.sleep(20)
    return {{"error": "not interrupted"}}

if not (child := os.fork()):
    exit_on_signals()
    run_job(interrupted, {job()}, quiet=True)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert forks.python(code).splitlines()[-1] == f"{-signal.SIGINT}"


def test_older_python_is_refused_with_one_line():
    code = f"import runpy, sys\nsys.version_info = (3, 10, 12)\nrunpy.run_path({str(HANDLER)!r}, run_name='__main__')"
    ran = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert ran.returncode == 1
    assert ran.stderr == "handler.py needs Python 3.11 or newer, this is Python 3.10\n"
    ast.parse(HANDLER.read_text(), feature_version=(3, 8))


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RUNPOD_LOG_LEVEL": "loud"}, "RUNPOD_LOG_LEVEL=loud: must be one of ERROR, WARN, INFO, DEBUG, TRACE, NOTSET"),
        ({"ATTENTION_SLICING": "fast"}, "ATTENTION_SLICING=fast: must be auto, max or off"),
        ({"MODEL_ID": "/no/such/model"}, "MODEL_ID=/no/such/model: no such file or directory"),
    ],
)
def test_failed_start_is_explained_in_one_line(tmp_path: Path, environment: dict[str, str], said: str):
    refused_to_start(forks.run_handler(tmp_path, "--check", **environment), said)
