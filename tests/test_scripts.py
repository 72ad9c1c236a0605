"""What the three scripts in examples have in common: values, files, errors, interrupts, broken downloads."""

import base64
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest
from PIL import Image

from src.api.prompt_warnings import NOT_UNDERSTOOD
from tests.support.client import Client, until
from tests.support.examples import EXAMPLES, ending_its_job, environment, run, start
from tests.support.forks import text_of
from tests.support.pictures import file, plain
from tests.support.platform_stub import Fault, Platform, serving

pytestmark = pytest.mark.process

Script = list[object]
DONE = {"output": {"image": "aGk=", "seed": 1}}


@pytest.fixture(params=["generate.sh", "generate.py", "generate.mjs"])
def script(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Script:
    """A script's command."""
    path = EXAMPLES / request.param
    if path.suffix == ".mjs":
        # which finds packages next to itself
        folder = tmp_path_factory.mktemp("project")
        (folder / "node_modules").symlink_to(request.getfixturevalue("node_modules"))
        return ["node", shutil.copy(path, folder)]
    return [path] if path.suffix == ".sh" else [sys.executable, path]


def error_of(script: Script, platform: Platform, folder: Path, *fields: str, **settings: str) -> str:
    """Returns the only line that a failed script prints."""
    ran = run([*script, "the sea", *fields], folder, **environment(platform, **settings))
    assert (ran.returncode, ran.stdout) == (1, "")
    (line,) = ran.stderr.splitlines()
    assert line.startswith("generate.")
    return line.partition(": ")[2]


def test_any_field_passes_through_and_several_pictures_are_numbered(
    script: Script, platform: Platform, client: Client, tmp_path: Path
):
    platform.faults += [Fault("/status/", status=502)]
    fields = ("num_images=2", "seed=3", "guidance_scale=5.5", "negative_prompt=a = b")
    ran = run([*script, "the sea", *fields], tmp_path, **environment(platform))
    assert (ran.stdout, ran.returncode) == ("picture-1.png seed 3\npicture-2.png seed 4\n", 0), ran.stderr
    parameters = Image.open(tmp_path / "picture-2.png").text["parameters"]
    assert parameters.startswith("the sea\nNegative prompt: a = b\n")
    assert "CFG scale: 5.5, Seed: 4, " in parameters


def test_picture_in_a_bucket_is_downloaded(script: Script, tmp_path: Path):
    with serving() as platform:
        output = {"image_url": f"{platform.url}/link", "seed": 1, "output_format": "webp", "warnings": ["careful"]}
        answer = json.dumps({"id": "1", "status": "COMPLETED", "output": output})
        platform.faults += [Fault("/status/", text=answer), Fault("/link", text="a picture")]
        ran = run([*script, "the sea"], tmp_path, **environment(platform))
    assert (ran.stdout, ran.returncode) == ("picture.webp seed 1\n", 0)
    assert ran.stderr.endswith("warning: careful\n")
    assert (tmp_path / "picture.webp").read_text() == "a picture"


def test_local_server_of_the_sdk_works_as_an_endpoint(
    script: Script, local_server: str, platform: Platform, tmp_path: Path
):
    here = environment(platform, ENDPOINT_URL=f"{local_server}/")
    ran = run([*script, "a cat", "num_inference_steps=2"], tmp_path, **here)
    assert ran.returncode == 0 and NOT_UNDERSTOOD in ran.stderr
    assert Image.open(tmp_path / "picture.png").size == (128, 128)


@pytest.mark.parametrize(
    ("fields", "settings", "error"),
    [
        (["width=65"], {}, "ended as FAILED: invalid input: width: must be a multiple of 8, got 65"),
        (["sea"], {}, "is not FIELD=VALUE; a prompt of several words needs quotes"),
        ([], {"RUNPOD_API_KEY": "wrong"}, "401"),
        ([], {"ENDPOINT_URL": "localhost"}, ""),
        ([], {"ENDPOINT_URL": ""}, "set ENDPOINT_ID and RUNPOD_API_KEY, or ENDPOINT_URL"),
    ],
)
def test_error_is_reported_in_one_line(
    script: Script,
    platform: Platform,
    client: Client,
    tmp_path: Path,
    fields: list[str],
    settings: dict[str, str],
    error: str,
):
    assert error in error_of(script, platform, tmp_path, *fields, **settings)
    assert list(tmp_path.iterdir()) == []


def test_endpoint_that_cannot_be_reached_is_named(script: Script, platform: Platform, tmp_path: Path):
    if script[0] == sys.executable:
        pytest.skip("the SDK tries for half a minute")
    assert "127.0.0.1:2" in error_of(script, platform, tmp_path, ENDPOINT_URL="http://127.0.0.1:2/x")


def test_job_that_is_cancelled_is_an_error(script: Script, tmp_path: Path):
    with ending_its_job("CANCELLED") as platform:
        assert "ended as CANCELLED" in error_of(script, platform, tmp_path)


def test_value_is_a_number_unless_its_field_is_text_or_json_cannot_hold_it(script: Script, tmp_path: Path):
    fields = json.loads((EXAMPLES / "schema" / "input.json").read_text())["properties"]
    sent = {name: "1990" for name, field in fields.items() if '"string"' in json.dumps(field)}
    assert {"prompt", "negative_prompt", "image"} <= sent.keys()
    sent |= {"a": "1e999", "b": "9" * 400, "c": "1٢", "d": "007", "e": "NaN", "f": ""}
    numbers = {"seed": "7", "strength": "0.5", "other": "-1.5e3"}
    with ending_its_job("COMPLETED", DONE) as platform:
        arguments = [f"{name}={value}" for name, value in (sent | numbers).items()]
        ran = run([*script, "the sea", *arguments], tmp_path, **environment(platform))
        (job,) = platform.jobs.values()
    assert ran.returncode == 0, ran.stderr
    assert job.input == sent | {"seed": 7, "strength": 0.5, "other": -1500}


@pytest.mark.parametrize("name", ["__proto__", "constructor", "prototype"])
def test_name_that_the_javascript_sdk_leaves_out_is_sent_or_refused(script: Script, tmp_path: Path, name: str):
    with ending_its_job("FAILED", {"error": f"{name}: unknown field"}) as platform:
        assert name in error_of(script, platform, tmp_path, f"{name}=7")
        assert all(name in job.input for job in platform.jobs.values())


def test_picture_is_sent_from_a_file_or_as_an_address(script: Script, tmp_path: Path):
    picture, address = file(plain("red")), "https://example.com/mask.png?a=b"
    (tmp_path / "a photo.png").write_bytes(picture)
    with ending_its_job("COMPLETED", DONE) as platform:
        fields = ["image=@a photo.png", f"mask={address}", "negative_prompt=@home"]
        ran = run([*script, "the sea", *fields], tmp_path, **environment(platform))
        (job,) = platform.jobs.values()
    assert ran.returncode == 0, ran.stderr
    sent = {"image": base64.b64encode(picture).decode(), "mask": address, "negative_prompt": "@home"}
    assert job.input == {"prompt": "the sea"} | sent


@pytest.mark.parametrize(("field", "error"), [("image=@nothing.png", "nothing.png"), ("mask=@large.png", "10 MB")])
def test_file_that_is_missing_or_too_large_is_told_before_a_job_is_sent(
    script: Script, tmp_path: Path, field: str, error: str
):
    (tmp_path / "large.png").write_bytes(bytes(7_500_000))
    with serving() as platform:
        assert error in error_of(script, platform, tmp_path, field)
        assert not platform.jobs


@pytest.mark.parametrize(
    ("path", "answer"), [("/run", "<html>"), ("/run", "{}"), ("/run", '{"id": null}'), ("/status/", '{"id": "1"}')]
)
def test_answer_that_is_not_from_runpod_ends_a_script(script: Script, tmp_path: Path, path: str, answer: str):
    with serving() as platform:
        platform.faults.append(Fault(path, text=answer))
        error = error_of(script, platform, tmp_path)
    assert error == "this is not an answer from RunPod: check ENDPOINT_URL" or (answer == "<html>" and error)


@pytest.mark.parametrize("output", [None, "a text", ["a text"], {"text": "a text"}])
def test_output_without_a_picture_is_told(script: Script, tmp_path: Path, output: object):
    with ending_its_job("COMPLETED", {"output": output}) as platform:
        assert "no picture" in error_of(script, platform, tmp_path)
    assert list(tmp_path.iterdir()) == []


CHUNKED = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("link", "fault"),
    [
        pytest.param("/link", {"raw": f"{CHUNKED}400\r\nhalf a picture"}, id="cut off"),
        pytest.param("/link", {"raw": "<html>Bad Gateway</html>"}, id="no HTTP"),
        pytest.param("/a link", {"status": 403}, id="a space"),
        pytest.param("/link", {"drop": True}, id="no answer"),
    ],
)
def test_download_that_breaks_leaves_an_older_file_as_it_was(
    script: Script, tmp_path: Path, link: str, fault: dict[str, Any]
):
    older = tmp_path / "picture.png"
    older.write_bytes(b"older")
    with serving() as platform:
        output = {"image_url": platform.url + link, "seed": 1}
        answer = json.dumps({"id": "1", "status": "COMPLETED", "output": output})
        platform.faults += [Fault("/status/", text=answer), Fault(link, **fault)]
        assert error_of(script, platform, tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"older"]


def test_endpoint_that_wants_to_be_asked_again_tomorrow_is_asked_now(script: Script, tmp_path: Path):
    busy = "HTTP/1.1 503 Busy\r\nRetry-After: 86400\r\nContent-Length: 0\r\n\r\n"
    with ending_its_job("COMPLETED", DONE) as platform:
        platform.faults.append(Fault("/status/", raw=busy))
        ran = run([*script, "the sea"], tmp_path, **environment(platform))
        assert (ran.returncode, platform.faults) == (0, []), ran.stderr


def interrupt(script: Script, platform: Platform, folder: Path, fault: Fault) -> str:
    """Presses Ctrl-C in a terminal whose script has met ``fault``. Returns what the script says then."""
    times = fault.times
    platform.faults.append(fault)
    with TemporaryFile() as said:
        process = start([*script, "the sea"], folder, environment(platform), stderr=said)
        until(lambda: fault.times < times)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
        return text_of(said)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param({"path": "/run", "delay": 0.5}, id="run"),
        pytest.param({"path": "/status/", "delay": 0.5}, id="status"),
        pytest.param({"path": "/status/", "status": 503, "times": 100}, id="busy"),
    ],
)
def test_interrupt_cancels_the_job_even_while_a_request_is_under_way(
    script: Script, tmp_path: Path, fault: dict[str, Any]
):
    with serving() as platform:
        said = interrupt(script, platform, tmp_path, Fault(**fault))
        (job,) = platform.jobs.values()
        assert said.endswith(f": cancelled job {job.id}\n")
        assert job.status == "CANCELLED"
    assert list(tmp_path.iterdir()) == []


def test_job_that_cannot_be_cancelled_is_told(script: Script, tmp_path: Path):
    with serving() as platform:
        platform.faults.append(Fault("/cancel/", status=500))
        said = interrupt(script, platform, tmp_path, Fault("/run", delay=0.5))
        (job,) = platform.jobs.values()
        assert f"cannot cancel job {job.id}: " in said and "500" in said
