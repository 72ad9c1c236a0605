"""examples/generate.py with the stand-in for RunPod, mostly in this process, which has already imported the SDK."""

import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
import runpod
from PIL import Image

from src.api.prompt_warnings import NOT_UNDERSTOOD
from tests.support.client import Client
from tests.support.examples import EXAMPLES, ending_its_job, environment
from tests.support.platform_stub import Platform

SCRIPT = str(EXAMPLES / "generate.py")
Generate = Callable[..., tuple[object, str, str]]


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> Generate:
    """Runs the example with short pauses. Returns its exit status or final message, and its two outputs."""
    real = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: real(min(seconds, 0.05)))
    monkeypatch.chdir(tmp_path)

    def run(platform: Platform, *arguments: str, **settings: str) -> tuple[object, str, str]:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [SCRIPT, *arguments])
            patch.setattr(runpod, "api_key", None)
            patch.setattr(runpod, "endpoint_url_base", f"{platform.url}/v2")
            patch.delenv("ENDPOINT_ID", raising=False)
            for name, value in environment(platform, **settings).items():
                patch.setenv(name, value)
            capsys.readouterr()
            try:
                runpy.run_path(SCRIPT, run_name="__main__")
                status: object = 0
            except SystemExit as exit:
                status = exit.code
            return status, *capsys.readouterr()

    return run


def test_any_field_passes_through_and_several_pictures_are_numbered(
    platform: Platform, client: Client, generate: Generate, tmp_path: Path
):
    fields = ("num_images=2", "seed=3", "guidance_scale=5.5", "negative_prompt=a = b")
    status, output, _ = generate(platform, "the sea", *fields)
    assert (status, output) == (0, "picture-1.png seed 3\npicture-2.png seed 4\n")
    parameters = Image.open(tmp_path / "picture-2.png").text["parameters"]
    assert parameters.startswith("the sea\nNegative prompt: a = b\n")
    assert "CFG scale: 5.5, Seed: 4, " in parameters


def test_picture_in_a_bucket_is_downloaded(local_server: str, generate: Generate, tmp_path: Path):
    # any file that can be downloaded
    link = f"{local_server}/openapi.json"
    with ending_its_job("COMPLETED", {"output": {"image_url": link, "seed": 1}}) as platform:
        assert generate(platform, "the sea") == (0, "picture.png seed 1\n", "")
    assert (tmp_path / "picture.png").read_bytes() == requests.get(link, timeout=10).content


def test_local_server_of_the_sdk_works_as_an_endpoint(
    platform: Platform, local_server: str, generate: Generate, tmp_path: Path
):
    status, _, warnings = generate(platform, "a cat", "num_inference_steps=2", ENDPOINT_URL=local_server)
    assert (status, warnings) == (0, f"warning: {NOT_UNDERSTOOD}\n")
    assert Image.open(tmp_path / "picture.png").size == (128, 128)
    status, _, _ = generate(platform, "the sea", "width=65", ENDPOINT_URL=local_server)
    assert str(status).endswith("ended as FAILED: invalid input: width: must be a multiple of 8, got 65")


@pytest.mark.parametrize(
    ("arguments", "settings", "error"),
    [
        (["the sea", "width=65"], {}, "ended as FAILED: invalid input: width: must be a multiple of 8, got 65"),
        (["the", "sea"], {}, "generate.py: sea is not FIELD=VALUE; a prompt of several words needs quotes"),
        (["the sea"], {"ENDPOINT_URL": ""}, "generate.py: set ENDPOINT_ID and RUNPOD_API_KEY, or ENDPOINT_URL"),
        (["the sea"], {"RUNPOD_API_KEY": "wrong"}, "generate.py: 401 Unauthorized"),
        (["the sea"], {"ENDPOINT_URL": "https://127.0.0.1:9"}, "Connection refused"),
        (["the sea"], {"ENDPOINT_URL": "localhost"}, "generate.py: Invalid URL"),
        (["the sea"], {"ENDPOINT_URL": "", "ENDPOINT_ID": "nothing"}, "generate.py: 404 Client Error: Not Found"),
    ],
)
def test_error_is_reported_in_one_line(
    platform: Platform,
    client: Client,
    generate: Generate,
    tmp_path: Path,
    arguments: list[str],
    settings: dict[str, str],
    error: str,
):
    status, _, _ = generate(platform, *arguments, **settings)
    assert error in str(status)
    assert "\n" not in str(status)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
@pytest.mark.parametrize(
    ("state", "output", "error"),
    [
        ("CANCELLED", None, "ended as CANCELLED: it has no picture"),
        ("COMPLETED", None, "ended as COMPLETED: it has no picture"),
        ("COMPLETED", {"image_url": "http://127.0.0.1:9/", "seed": 1}, "Connection refused"),
    ],
)
def test_job_without_a_picture_is_an_error(
    generate: Generate, tmp_path: Path, state: str, output: dict[str, object] | None, error: str
):
    with ending_its_job(state, {"output": output}) as platform:
        status, _, _ = generate(platform, "the sea")
    assert error in str(status)
    assert list(tmp_path.iterdir()) == []
