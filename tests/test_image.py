"""The steps of the Dockerfile, tried without building an image; tests/image/build.sh builds it."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import runpod
import torch

from src.settings import DEFAULT_MODEL_ID
from src.startup import prefetch
from tests.support import hub
from tests.support.processes import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", "")


def copied(instructions: str = DOCKERFILE) -> list[tuple[str, str]]:
    """Returns the source and destination of each copy, in order."""
    lines = re.findall(r"^COPY (.+) (\S+)$", instructions, re.M)
    return [(source, target) for sources, target in lines for source in sources.split()]


def variables(instruction: str) -> dict[str, str]:
    """Returns the variables that ``ENV`` or ``ARG`` sets."""
    return dict(re.findall(r"(\w+)=(\S*)", " ".join(re.findall(rf"^{instruction} (.+)$", DOCKERFILE, re.M))))


def test_copied_files_exist_and_are_in_the_build_context():
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for name, _ in copied():
        assert (ROOT / name).exists()
        assert any(name == allowed or name.startswith(f"{allowed}/") for allowed in let_in), name


def test_default_model_is_the_one_that_the_worker_pins():
    # the fetch knows its revision
    assert variables("ARG").items() >= {"MODEL_ID": DEFAULT_MODEL_ID, "MODEL_REVISION": ""}.items()


def test_requirements_are_pinned_to_the_images_versions():
    required = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    pinned = (ROOT / "builder" / "constraints.txt").read_text().lower().splitlines()
    assert required
    for line in required:
        requirement = re.fullmatch(r"([\w-]+==[\d.]+); python_version >= \"3\.11\"", line)
        assert requirement
        # torch and its dependencies come from another index
        assert (requirement[1] in pinned) != line.startswith("torch==")
    assert not [line for line in pinned if re.match("(torch|triton|cuda-|nvidia-)", line)]


def test_image_requests_the_gpu_from_the_container_runtime():
    set_by_nvidia = {"NVIDIA_VISIBLE_DEVICES": "all", "NVIDIA_DRIVER_CAPABILITIES": "compute,utility"}
    assert variables("ENV").items() >= set_by_nvidia.items()


@pytest.mark.process
def test_copied_files_suffice_to_fetch_a_model_record_a_start_and_start(v1_4_repository: Path, tmp_path: Path):
    app, model = tmp_path / "app", tmp_path / "model"
    app.mkdir()

    def run(command: list[str], **environment: str) -> str:
        environment = os.environ | {"HF_HOME": str(tmp_path / "huggingface")} | environment
        ran = subprocess.run(command, cwd=app, env=environment, text=True, capture_output=True)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    def copy(source: str, target: str) -> None:
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, app / target, dirs_exist_ok=True)
        else:
            (app / target).mkdir(exist_ok=True)
            shutil.copy(ROOT / source, app / target)

    before, fetch, after = re.split(r"python (-m builder\.fetch_model .+)$", DOCKERFILE, flags=re.M)
    for pair in copied(before):
        copy(*pair)
    values = {"$MODEL_ID": "someone/tiny", "$MODEL_REVISION": "", "/model": str(model)}
    arguments = [values.get(word, word) for word in shlex.split(fetch)]
    with hub.serve("someone/tiny", v1_4_repository) as (address, _):
        run([sys.executable, *arguments], HF_ENDPOINT=address)
    for pair in copied(after):
        copy(*pair)
    (record,) = re.findall(r"python (-m builder\.record_start \S+ \S+)", after)
    run([sys.executable, *shlex.split(record)])
    files = [Path(line) for line in (app / "src" / prefetch.START_FILES.name).read_text().splitlines()]
    assert all(file.is_file() for file in files) and len(set(files)) == len(files) > 2000
    assert {Path(module.__cached__) for module in (torch, runpod)} < set(files)
    assert "libtorch_cpu.so" in {file.name for file in files}
    settings = variables("ENV")
    assert settings.pop("MODEL_ID") == "${MODEL_ID:+/model}"
    assert settings["HF_HUB_OFFLINE"] == "1"
    (command,) = re.findall(r"^CMD (.+)$", DOCKERFILE, re.M)
    printed = run(
        [sys.executable, *json.loads(command)[1:], "--check"], **settings | {"MODEL_ID": str(model), "HOME": str(app)}
    )
    assert f"model: someone/tiny at {hub.REVISION[:12]}, directory {model}" in printed
    assert "ready: " in printed


def test_no_host_is_kept_out_by_a_list_of_cuda_versions():
    for file in ("hub.json", "tests.json"):
        assert "allowedCudaVersions" not in json.loads((ROOT / ".runpod" / file).read_text())["config"]
