"""What users hold in their hands, driven as they drive it: scripts, the Postman collection, the README's commands."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image

from src.api.picture import encode
from src.api.request import OutputFormat
from src.model.demo.vocabulary import NOT_UNDERSTOOD
from tests.support.client import Client, receiver, until
from tests.support.platform_stub import Fault, Platform, serving

ROOT = Path(__file__).parents[1]
GENERATE = ROOT / "examples" / "generate.sh"


def environment(platform: Platform, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("ENDPOINT_ID", "ENDPOINT_URL")}
    return kept | {"ENDPOINT_URL": f"{platform.url}/v2/local", "RUNPOD_API_KEY": platform.key} | more


def generate(folder: Path, env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([GENERATE, *arguments], cwd=folder, env=env, text=True, capture_output=True, timeout=90)


def last_line(ran: subprocess.CompletedProcess[str]) -> str:
    """The last line that the script says when it fails."""
    assert ran.returncode not in (0, -signal.SIGINT)
    return ran.stderr.replace("\r\033[K", "\n").strip().splitlines()[-1].removeprefix("generate.sh: ")


def test_the_script_saves_a_picture_of_any_prompt(platform: Platform, client: Client, tmp_path: Path):
    prompt = "a \"red\" circle\\n on\n a $(blue) `background` '🎿' 山"
    ran = generate(
        tmp_path, environment(platform), prompt, "-n", "blur", "--steps", "3", "--size", "64x72", "--seed", "9"
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "picture.png seed 9\n"
    picture = Image.open(tmp_path / "picture.png")
    assert picture.size == (64, 72)
    assert picture.text["parameters"].startswith(f"{prompt}\nNegative prompt: blur\nSteps: 3, ")


def test_the_script_saves_several_pictures(platform: Platform, client: Client, tmp_path: Path):
    options = (
        "--images",
        "3",
        "--steps",
        "2",
        "--seed",
        "4",
        "--scheduler",
        "DDIM",
        "--guidance",
        "5.5",
        "-o",
        "sea.png",
    )
    ran = generate(tmp_path, environment(platform), "the sea", *options)
    assert ran.stdout == "sea-1.png seed 4\nsea-2.png seed 5\nsea-3.png seed 6\n", ran.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"sea-1.png", "sea-2.png", "sea-3.png"}


@pytest.mark.parametrize(
    ("options", "name", "kind"),
    [
        (["-o", "sea.JPG"], "sea.JPG", "JPEG"),
        (["-o", "sea.webp", "--quality", "10"], "sea.webp", "WEBP"),
        (["--format", "jpeg"], "picture.jpeg", "JPEG"),
        (["-o", "sea", "--format", "webp"], "sea", "WEBP"),
        (["-o", "v1.4"], "v1.4", "PNG"),
    ],
)
@pytest.mark.parametrize("example", ["script", "python"])
def test_a_file_holds_what_its_ending_says(
    platform: Platform, client: Client, tmp_path: Path, example: str, options: list[str], name: str, kind: str
):
    if example == "script":
        ran = generate(tmp_path, environment(platform), "the sea", "--steps", "1", *options)
    else:
        ran = python_example(platform, tmp_path, "the sea", *options)
    assert ran.stdout.startswith(f"{name} seed "), ran.stderr
    assert Image.open(tmp_path / name).format == kind


def test_the_script_and_the_sdks_local_server(local_server: str, tmp_path: Path):
    ran = generate(tmp_path, os.environ | {"ENDPOINT_URL": local_server + "/"}, "the sea", "--steps", "2")
    assert ran.returncode == 0, ran.stderr
    assert Image.open(tmp_path / "picture.png").size == (128, 128)


@pytest.mark.process
def test_the_script_fetches_a_picture_from_a_bucket(tmp_path: Path):
    with serving() as platform:
        bucket = tmp_path / "bucket.png"
        Image.new("RGB", (8, 8)).save(bucket)

        def work() -> None:
            (job,) = until(platform.jobs.values)
            result = {"output": {"image_url": bucket.as_uri(), "seed": 1, "warnings": ["careful"]}}
            platform.loop.call_soon_threadsafe(platform.end, job, "COMPLETED", result)

        threading.Thread(target=work).start()
        ran = generate(tmp_path, environment(platform), "the sea")
    assert (ran.stdout, ran.returncode) == ("picture.png seed 1\n", 0)
    assert "warning: careful" in ran.stderr
    assert (tmp_path / "picture.png").read_bytes() == bucket.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "settings", "said"),
    [
        (["the sea", "--size", "65x64"], {}, "failed: invalid input: width: must be a multiple of 8, got 65"),
        (["the sea", "--size", "large"], {}, "--size wants WxH, such as 512x512, got large"),
        (["the sea", "--steps", "many"], {}, "num_inference_steps wants a number, got many"),
        (["the sea", "--stpes", "3"], {}, "unknown option --stpes, see --help"),
        (["the sea", "--steps"], {}, "--steps wants a value"),
        (["the", "sea"], {}, "one prompt only: put it in quotes"),
        (
            ["the sea", "-o", "sea.jpg", "--format", "webp"],
            {},
            "sea.jpg is the name of a jpeg, --format says webp",
        ),
        (
            ["the sea", "--format", "gif"],
            {},
            "failed: invalid input: output_format: must be png, jpeg or webp, got gif",
        ),
        (["the sea", "-o", "nowhere/picture.png"], {}, "no such directory: nowhere"),
        (["the sea", "-o", "."], {}, ". is a directory: -o wants the name of a file"),
        (["the sea", "-o", "/proc/self/sea.png"], {}, "cannot write into /proc/self"),
        (["the sea"], {"RUNPOD_API_KEY": "wrong"}, "the API key was refused (401): check RUNPOD_API_KEY"),
        (["the sea"], {"ENDPOINT_URL": "http://127.0.0.1:9"}, "no answer from http://127.0.0.1:9: "),
        (["the sea"], {"ENDPOINT_URL": ""}, "set ENDPOINT_ID and RUNPOD_API_KEY, or ENDPOINT_URL"),
    ],
)
def test_the_script_says_what_is_wrong(
    platform: Platform, client: Client, tmp_path: Path, arguments: list[str], settings: dict[str, str], said: str
):
    assert said in last_line(generate(tmp_path, environment(platform, **settings), *arguments))
    assert list(tmp_path.iterdir()) == []


def test_the_script_says_that_there_is_no_such_endpoint(platform: Platform, client: Client, tmp_path: Path):
    said = last_line(generate(tmp_path, environment(platform, ENDPOINT_URL=f"{platform.url}/v2/nothing"), "the sea"))
    assert said.startswith("not found (404): check ENDPOINT_URL")
    by_id = {"ENDPOINT_URL": "", "ENDPOINT_ID": "nothing", "RUNPOD_ENDPOINT_BASE_URL": f"{platform.url}/v2"}
    said = last_line(generate(tmp_path, environment(platform, **by_id), "the sea"))
    assert said.startswith("not found (404): check ENDPOINT_ID")


def test_a_picture_that_cannot_be_saved_is_reported_in_one_line(platform: Platform, client: Client, tmp_path: Path):
    name = "x" * 252 + ".png"
    ran = generate(tmp_path, environment(platform), "the sea", "--steps", "1", "-o", name)
    assert re.search(
        rf"cannot write {name}: File name too long; /status/[\w-]+ has it for half an hour$", last_line(ran)
    )
    ran = python_example(platform, tmp_path, "the sea", "-o", name)
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1] == f"generate.py: error: cannot write {name}: File name too long"
    assert list(tmp_path.iterdir()) == []


def test_the_script_backs_off(platform: Platform, client: Client, tmp_path: Path):
    platform.faults += [
        Fault("/run", status=429, times=2),
        Fault("/status/", status=429),
        Fault("/status/", status=502),
    ]
    ran = generate(tmp_path, environment(platform), "the sea", "--steps", "2")
    assert ran.returncode == 0
    retries = re.findall(r"the endpoint is busy or broken \((\d+)\), trying again in (\d) s\n", ran.stderr)
    assert retries == [("429", "1"), ("429", "2"), ("429", "1"), ("502", "2")]


@pytest.mark.process
@pytest.mark.parametrize("state", ["CANCELLED", "TIMED_OUT"])
def test_the_script_says_how_a_job_ended(tmp_path: Path, state: str):
    with serving() as platform:

        def end() -> None:
            (job,) = until(platform.jobs.values)
            platform.loop.call_soon_threadsafe(platform.end, job, state)

        threading.Thread(target=end).start()
        assert last_line(generate(tmp_path, environment(platform), "the sea")).endswith(f"ended as {state}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_interrupted_the_script_cancels_its_job(tmp_path: Path):
    with serving() as platform:
        command = [GENERATE, "the sea"]
        script = subprocess.Popen(
            command, cwd=tmp_path, env=environment(platform), stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        (job,) = until(platform.jobs.values)
        time.sleep(1)
        os.killpg(script.pid, signal.SIGINT)
        _, said = script.communicate(timeout=20)
        assert script.returncode == 130
        assert f"cancelled job {job.id}" in said
        assert job.status == "CANCELLED"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_shellcheck_finds_nothing():
    scripts = [GENERATE, ROOT / ".ci" / "run", ROOT / "tests" / "image" / "build.sh"]
    shellcheck = Path(sys.executable).with_name("shellcheck")
    ran = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "")


def python_example(
    platform: Platform, folder: Path, *arguments: str, **settings: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "examples" / "generate.py", *arguments],
        cwd=folder,
        env=environment(platform, **settings),
        text=True,
        capture_output=True,
        timeout=90,
    )


def test_the_python_example(platform: Platform, client: Client, tmp_path: Path):
    ran = python_example(platform, tmp_path, "the sea", "--images", "2", "--seed", "3", "-o", "sea.png")
    assert ran.stdout.splitlines() == ["sea-1.png seed 3", "sea-2.png seed 4"], ran.stderr
    assert Image.open(tmp_path / "sea-2.png").size == (128, 128)
    ran = python_example(platform, tmp_path, "the sea", "--images", "9")
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == ("generate.py: FAILED: invalid input: num_images: must be at most 4, got 9")
    by_id = {"ENDPOINT_URL": "", "ENDPOINT_ID": "local", "RUNPOD_ENDPOINT_BASE_URL": f"{platform.url}/v2"}
    assert python_example(platform, tmp_path, "the sea", **by_id).stdout.startswith("picture.png seed ")


def test_the_python_example_and_the_sdks_local_server(platform: Platform, local_server: str, tmp_path: Path):
    ran = python_example(platform, tmp_path, "a cat", ENDPOINT_URL=local_server)
    assert ran.returncode == 0
    assert ran.stderr == f"warning: {NOT_UNDERSTOOD}\n"
    assert Image.open(tmp_path / "picture.png").size == (128, 128)


@pytest.mark.parametrize(
    ("arguments", "settings", "said"),
    [
        (["the sea"], {"ENDPOINT_URL": ""}, "generate.py: set ENDPOINT_ID and RUNPOD_API_KEY, or ENDPOINT_URL"),
        (["the sea"], {"RUNPOD_API_KEY": "wrong"}, "generate.py: 401 Unauthorized"),
        (["the sea"], {"ENDPOINT_URL": "https://127.0.0.1:9"}, "generate.py: no answer from https://127.0.0.1:9"),
        (["the sea"], {"ENDPOINT_URL": "localhost"}, "generate.py: "),
        (["the sea", "-o", "."], {}, "generate.py: error: . is a directory: -o wants the name of a file"),
        (["the sea", "-o", "nowhere/sea.png"], {}, "generate.py: error: cannot write nowhere/sea.png: No such file"),
        (["the sea", "-o", "a.jpg", "--format", "png"], {}, "generate.py: error: a.jpg is the name of a jpeg"),
    ],
)
def test_the_python_example_says_what_is_wrong(
    platform: Platform, client: Client, tmp_path: Path, arguments: list[str], settings: dict[str, str], said: str
):
    ran = python_example(platform, tmp_path, *arguments, **settings)
    assert ran.returncode in (1, 2)
    assert ran.stderr.splitlines()[-1].startswith(said)
    assert "Traceback" not in ran.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_the_python_example_outlives_a_fault_and_cancels_its_job_when_interrupted(tmp_path: Path):
    with serving() as platform:
        platform.faults += [Fault("/status/", status=502)]
        example = subprocess.Popen(
            [sys.executable, ROOT / "examples" / "generate.py", "the sea"],
            cwd=tmp_path,
            env=environment(platform),
            stderr=subprocess.PIPE,
            text=True,
        )
        (job,) = until(platform.jobs.values)
        until(lambda: not platform.faults)
        time.sleep(1)
        example.send_signal(signal.SIGINT)
        _, said = example.communicate(timeout=20)
        assert (example.returncode, said, job.status) == (130, "", "CANCELLED")


@pytest.fixture(scope="session")
def newman() -> Path:
    if not shutil.which("npm"):
        pytest.skip("needs node and npm")
    folder = ROOT / "tests" / "postman"
    if not (folder / "node_modules").exists():
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=folder, check=True, capture_output=True)
    return folder / "node_modules" / ".bin" / "newman"


def run_collection(
    newman: Path, file: str, folder: Path, requests: Sequence[str] = (), **variables: str
) -> dict[str, Any]:
    """What newman reports of a run of the whole collection, or of some ``requests`` of it."""
    postman = ROOT / "examples" / "postman"
    report = folder / "report.json"
    command = [newman, "run", postman / "stable-diffusion-worker.postman_collection.json", "-e", postman / file]
    for request in requests:
        command += ["--folder", request]
    for name, value in variables.items():
        command += ["--env-var", f"{name}={value}"]
    ran = subprocess.run(
        [*command, "--reporters", "cli,json", "--reporter-json-export", report],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stdout
    return json.loads(report.read_text())["run"]


def names_sent(run: dict[str, Any]) -> list[str]:
    return [execution["item"]["name"] for execution in run["executions"] if execution.get("response")]


def test_the_postman_collection_on_the_platform(newman: Path, platform: Platform, client: Client, tmp_path: Path):
    url = f"{platform.url}/v2/local"
    with receiver(200) as (webhook_url, received):
        variables = {"base_url": url, "api_key": platform.key, "webhook_url": webhook_url, "allow_purge": "1"}
        run = run_collection(newman, "runpod.postman_environment.json", tmp_path, **variables)
        until(lambda: received)
    assert list(dict.fromkeys(names_sent(run))) == [
        "Generate",
        "Status",
        "Generate and wait",
        "Several images",
        "A bad request",
        "Retry",
        "Generate with a webhook",
        "Generate with a policy",
        "Cancel",
        "Purge the queue",
        "Health",
    ]
    assert names_sent(run).count("Status") > 1
    assert run["stats"]["assertions"]["total"] >= 10


def test_a_run_of_the_postman_collection_purges_the_queue_only_where_it_may(
    newman: Path, platform: Platform, client: Client, tmp_path: Path
):
    variables = {"base_url": client.url, "api_key": platform.key}
    requests = ["Generate with a webhook", "Purge the queue", "Health"]
    run = run_collection(newman, "runpod.postman_environment.json", tmp_path, requests, **variables)
    assert names_sent(run) == ["Health"]


def test_the_postman_collection_on_the_sdks_local_server(newman: Path, local_server: str, tmp_path: Path):
    run = run_collection(newman, "localhost.postman_environment.json", tmp_path, base_url=local_server)
    assert names_sent(run) == ["Generate", "Status", "Generate and wait", "Several images", "A bad request"]


def test_postman_collection_knows_how_files_of_every_format_begin():
    collection = json.loads((ROOT / "examples/postman/stable-diffusion-worker.postman_collection.json").read_text())
    checks = re.findall(r"const BEGINNING = \{(.*?)\}", json.dumps(collection).replace('\\"', '"'))
    beginnings = [dict(re.findall(r'(\w+): "([^"]+)"', check)) for check in checks]
    assert beginnings and all(each == beginnings[0] for each in beginnings)
    assert list(beginnings[0]) == list(get_args(OutputFormat))
    for output_format, beginning in beginnings[0].items():
        file = encode(Image.new("RGB", (8, 8)), "a cat", output_format, 90)
        assert base64.b64encode(file).decode().startswith(beginning)


def test_no_key_is_in_the_postman_files():
    for path in (ROOT / "examples" / "postman").glob("*.postman_environment.json"):
        (key,) = [value for value in json.loads(path.read_text())["values"] if value["key"] == "api_key"]
        assert (key["value"], key["type"]) == ("", "secret")


def readme_commands() -> list[str]:
    """The README's commands that call an endpoint."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", readme, re.S)
    return [block for block in blocks if "curl" in block or "examples/" in block]


def readme_exports() -> list[list[str]]:
    """The variables that the README's commands find an endpoint by: those of each of its ``export`` commands."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return [re.findall(r"(\w+)=", line) for line in re.findall(r"^export .*$", readme, re.M)]


@pytest.mark.parametrize(
    ("command", "exported"),
    [
        (command, exported)
        for command in readme_commands()
        for exported in readme_exports()
        if set(re.findall(r"\$(\w+)", command)) <= set(exported)
    ],
)
def test_the_readmes_commands_generate(
    platform: Platform, client: Client, local_server: str, tmp_path: Path, command: str, exported: list[str]
):
    for replaced, by in (
        ("https://api.runpod.ai/v2", f"{platform.url}/v2"),
        ("http://localhost:8000/v2/local", f"{platform.url}/v2/local"),
        ("RUNPOD_API_KEY=local", f"RUNPOD_API_KEY={platform.key}"),
        ("localhost:8000", local_server.removeprefix("http://")),
        (".venv/bin/python", sys.executable),
        ("examples/", f"{ROOT}/examples/"),
    ):
        command = command.replace(replaced, by)
    # whoever follows it pastes the id that the first answer gave
    command = command.replace("<id>", client.run())
    values = {"ENDPOINT_URL": local_server, "ENDPOINT_ID": "local", "RUNPOD_API_KEY": platform.key}
    env = os.environ | {name: values[name] for name in exported}
    # in place of api.runpod.ai
    env["RUNPOD_ENDPOINT_BASE_URL"] = f"{platform.url}/v2"
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    pictures = list(tmp_path.glob("*.png"))
    states = re.findall(r'"status": ?"(\w+)"', ran.stdout)
    assert pictures or states
    assert set(states) <= {"IN_QUEUE", "IN_PROGRESS", "COMPLETED"}
    for path in pictures:
        assert Image.open(path).size == (128, 128)
