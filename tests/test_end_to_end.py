"""The real program in a real process: the local run, the local server over HTTP, starts that fail."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import requests
from PIL import Image

from tests.client import picture

HANDLER = Path(__file__).parents[1] / "handler.py"
BASELINES_PROMPT = "A double-black diamond mountain to ski on near Seattle."


def run_handler(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, HANDLER, *arguments],
        cwd=folder,
        env=os.environ | environment,
        text=True,
        capture_output=True,
        timeout=120,
    )


def test_the_bare_command_paints_the_test_input(tmp_path: Path):
    (tmp_path / "test_input.json").write_text((HANDLER.parent / "test_input.json").read_text())
    ran = run_handler(tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    path = Path(re.fullmatch(r"picture: (.+)", ran.stdout.splitlines()[-1])[1])
    assert path == tmp_path / "picture.png"
    painted = Image.open(path)
    assert painted.size == (128, 128)
    assert painted.text["parameters"].startswith(
        f"{BASELINES_PROMPT}\nSteps: 50, Sampler: DDIM, CFG scale: 7.5, Seed: "
    )
    assert "model: demo, embedded" in ran.stdout
    assert "Traceback" not in ran.stderr


def test_several_pictures_are_numbered_and_a_bad_job_fails(tmp_path: Path):
    ran = run_handler(
        tmp_path, "--test_input", '{"input": {"prompt": "sea", "num_images": 2, "num_inference_steps": 2}}'
    )
    assert ran.returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"picture-1.png", "picture-2.png"}
    ran = run_handler(tmp_path, "--test_input", '{"input": {"promt": "sea"}}')
    assert ran.returncode == 1
    assert "invalid input: prompt: required; promt: unknown field, did you mean prompt?" in ran.stdout
    assert "Traceback" not in ran.stdout + ran.stderr


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ATTENTION_SLICING": "fast"}, "ATTENTION_SLICING=fast: must be auto, max or off"),
        ({"MODEL_ID": "/no/such/model"}, "MODEL_ID=/no/such/model: no such directory"),
    ],
)
def test_a_worker_that_cannot_start_says_why_in_one_line(tmp_path: Path, environment: dict[str, str], said: str):
    ran = run_handler(tmp_path, **environment)
    assert ran.returncode == 1
    (line,) = ran.stdout.splitlines()
    assert line.startswith(f"ERROR  | the worker cannot start: {said}")
    assert ran.stderr == ""


def post(address: str, **job_input: object) -> dict:
    return requests.post(address, json={"input": job_input}, timeout=60).json()


def test_run_and_status(local_server: str):
    started = post(f"{local_server}/run", prompt="a red circle on a blue background", seed=1, num_inference_steps=10)
    assert started["status"] == "IN_PROGRESS"
    done = requests.post(f"{local_server}/status/{started['id']}", timeout=60).json()
    assert done["status"] == "COMPLETED"
    assert (done["output"]["seed"], done["output"]["model"]) == (1, "demo")
    assert picture(done["output"]).size == (128, 128)


def test_runsync_is_reproducible_and_speaks_any_language(local_server: str):
    prompt = '山 🎿 "quoted" \\ and\nnew lines'
    first, second = (post(f"{local_server}/runsync", prompt=prompt, seed=2, num_inference_steps=3) for _ in "ab")
    assert first["status"] == "COMPLETED"
    assert first["output"] == second["output"]
    assert picture(first["output"]).text["parameters"].startswith(prompt)


def test_a_bad_request_fails_in_words(local_server: str):
    told = post(f"{local_server}/runsync", prompt="x", width=515)
    assert told["status"] == "FAILED"
    assert told["error"] == "invalid input: width: must be a multiple of 8, got 515"
