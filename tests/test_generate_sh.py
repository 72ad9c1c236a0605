"""examples/generate.sh with the stand-in for RunPod."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support.client import Client
from tests.support.examples import EXAMPLES, ending_its_job, environment, run
from tests.support.platform_stub import Fault, Platform, serving
from tests.support.processes import ROOT

GENERATE = EXAMPLES / "generate.sh"


def generate(platform: Platform, folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return run([GENERATE, *arguments], folder, **environment(platform, **settings))


def error_of(ran: subprocess.CompletedProcess[str]) -> str:
    """Returns the only line that a failed script prints."""
    assert (ran.returncode, ran.stdout) == (1, "")
    (line,) = ran.stderr.splitlines()
    return line.removeprefix("generate.sh: ")


def test_any_prompt_becomes_a_picture(platform: Platform, client: Client, tmp_path: Path):
    prompt = "a \"red\" circle\\n on\n a $(blue) `background` = '🎿' 山"
    fields = ("negative_prompt=a = b", "num_inference_steps=3", "width=64", "height=72", "seed=9")
    ran = generate(platform, tmp_path, prompt, *fields)
    assert (ran.stdout, ran.returncode) == ("picture.png seed 9\n", 0), ran.stderr
    picture = Image.open(tmp_path / "picture.png")
    assert picture.size == (64, 72)
    assert picture.text["parameters"].startswith(f"{prompt}\nNegative prompt: a = b\nSteps: 3, ")


def test_several_pictures_are_numbered(platform: Platform, client: Client, tmp_path: Path):
    fields = ("num_images=3", "num_inference_steps=2", "seed=4")
    ran = generate(platform, tmp_path, "the sea", "-o", "sea.v1.JPG", *fields)
    assert ran.stdout == "sea.v1-1.JPG seed 4\nsea.v1-2.JPG seed 5\nsea.v1-3.JPG seed 6\n", ran.stderr
    assert {Image.open(path).format for path in tmp_path.iterdir()} == {"JPEG"}
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "name", "job_input"),
    [
        (["-o", "a.JPG"], "a.JPG", {"output_format": "jpeg"}),
        (["-o", "a.webp", "output_quality=10"], "a.webp", {"output_format": "webp", "output_quality": 10}),
        (["-o", "v1.4"], "v1.4", {}),
        (["output_format=avif"], "picture.avif", {"output_format": "avif"}),
        (["-o", "a.png", "output_format=webp"], "a.png", {"output_format": "webp"}),
        (['a="\\'], "picture.png", {"a": '"\\'}),
    ],
)
def test_any_field_passes_through_and_the_file_ending_sets_the_format(
    tmp_path: Path, arguments: list[str], name: str, job_input: dict[str, object]
):
    output = {"image": "aGk=", "seed": 1, "output_format": job_input.get("output_format", "png")}
    with ending_its_job("COMPLETED", {"output": output}) as platform:
        ran = generate(platform, tmp_path, "7", *arguments)
        (job,) = platform.jobs.values()
    assert ran.stdout == f"{name} seed 1\n", ran.stderr
    assert (tmp_path / name).read_bytes() == b"hi"
    assert job.input == {"prompt": "7"} | job_input


@pytest.mark.process
def test_progress_is_shown_on_a_terminal(tmp_path: Path):
    terminal, its_end = pty.openpty()
    with ending_its_job("FAILED", {"error": "no luck"}) as platform:
        command, env = [GENERATE, "the sea"], os.environ | environment(platform)
        script = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=its_end)
        assert script.wait(20) == 1
    text = ""
    while not text.endswith("\n"):
        text += os.read(terminal, 1000).decode()
    shown = text.split("\r\033[K")
    assert shown[1].strip() == "IN_QUEUE"
    assert re.fullmatch(r"generate.sh: job [\w-]+ ended as FAILED: no luck\r\n", shown[-1])


@pytest.mark.parametrize(
    ("arguments", "settings", "error"),
    [
        (["the sea", "--seed", "3"], {}, "--seed is not FIELD=VALUE; .*"),
        (["the sea", "-o"], {}, "-o needs a file name"),
        ([], {}, "the prompt comes first, see --help"),
        (["-o", "sea.png", "the sea"], {}, "the prompt comes first, see --help"),
        (["the sea", "-o", "nowhere/sea.png"], {}, "cannot write nowhere/sea.png"),
        (["the sea", "-o", "."], {}, "cannot write ."),
        (["the sea", "-o", "/proc/self/sea.png"], {}, "cannot write /proc/self/sea.png"),
        (["the sea"], {"RUNPOD_API_KEY": "wrong"}, "the endpoint answered 401: check RUNPOD_API_KEY, .*"),
    ],
)
def test_error_is_reported_in_one_line(
    platform: Platform, client: Client, tmp_path: Path, arguments: list[str], settings: dict[str, str], error: str
):
    assert re.fullmatch(error, error_of(generate(platform, tmp_path, *arguments, **settings)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
@pytest.mark.parametrize(
    ("status", "output", "error"),
    [
        ("TIMED_OUT", None, "ended as TIMED_OUT"),
        ("COMPLETED", None, "the job has no picture: its result may have been over the platform's limit"),
        ("COMPLETED", {"image": "aGk=", "seed": 1}, "cannot save x+.png: .*File name too long.*"),
    ],
)
def test_job_without_a_picture_is_an_error(tmp_path: Path, status: str, output: dict[str, object], error: str):
    with ending_its_job(status, {"output": output}) as platform:
        ran = generate(platform, tmp_path, "the sea", "-o", "x" * 252 + ".png")
    assert re.search(f"{error}$", error_of(ran))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_error_after_the_job_was_sent_names_it(tmp_path: Path):
    with serving() as platform:
        platform.faults += [Fault("/status/", status=400)]
        error = error_of(generate(platform, tmp_path, "the sea"))
        (job,) = platform.jobs
    assert error.startswith(f"the endpoint answered 400 about job {job}: ")


@pytest.mark.process
def test_job_that_the_endpoint_may_have_taken_is_not_sent_again(tmp_path: Path):
    with serving() as platform:
        platform.faults += [Fault("/run", status=502)]
        assert error_of(generate(platform, tmp_path, "the sea")).startswith("the endpoint answered 502: ")
        assert not platform.jobs


@pytest.mark.process
def test_shellcheck_finds_nothing():
    scripts = [GENERATE, ROOT / ".ci" / "run", ROOT / "tests" / "image" / "build.sh"]
    shellcheck = Path(sys.executable).with_name("shellcheck")
    ran = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "")
