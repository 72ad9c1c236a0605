import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from src import pipeline
from src.settings import DEFAULT_MODEL_ID, DEFAULT_MODEL_REVISION, Settings
from tests import hub

ROOT = Path(__file__).parents[1]


def fetch(output: Path, address: str, home: Path, revision: str = hub.REVISION) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "builder.fetch_model", "--model", "someone/tiny", "--revision", revision]
    return subprocess.run(
        [*command, "--output", output],
        cwd=ROOT,
        env=os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(home)},
        text=True,
        capture_output=True,
    )


def test_a_model_is_baked_in_float16_and_remembers_its_name(repository: Path, tmp_path: Path):
    output = tmp_path / "model"
    with hub.serve("someone/tiny", repository) as (address, fetched):
        ran = fetch(output, address, tmp_path / "home")
    assert ran.returncode == 0, ran.stderr
    assert not [name for name in fetched if name.endswith(".bin")]
    kept = {path.relative_to(output).as_posix() for path in output.rglob("*.*")}
    assert not [name for name in kept if name.endswith(".bin")]
    assert all(path.stat().st_mode & 0o004 for path in output.rglob("*")), "the image's user cannot read it"
    tensors = load_file(output / "unet" / "diffusion_pytorch_model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.float16}
    model = pipeline.load(Settings(model_id=str(output)))
    assert model.name == "someone/tiny"
    assert model.pipe.safety_checker is not None


def test_a_failed_fetch_says_why_and_leaves_nothing(repository: Path, tmp_path: Path):
    with hub.serve("someone/tiny", repository) as (address, _):
        ran = fetch(tmp_path / "model", address, tmp_path / "home", revision="nope")
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == (
        "cannot fetch someone/tiny: someone/tiny at revision nope: the hub has no such revision"
    )
    assert not (tmp_path / "model").exists()


def test_the_dockerfile_bakes_the_default_model_and_copies_what_the_context_holds():
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"ARG MODEL_ID={DEFAULT_MODEL_ID}\n" in dockerfile
    assert f"ARG MODEL_REVISION={DEFAULT_MODEL_REVISION}\n" in dockerfile
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", dockerfile, re.M) for name in line.split()}
    for name in copied:
        assert (ROOT / name).exists()
        assert any(name == allowed or name.startswith(f"{allowed}/") for allowed in let_in), name


def test_every_requirement_is_pinned_as_the_image_has_it():
    required = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    pinned = (ROOT / "builder" / "constraints.txt").read_text().lower().splitlines()
    assert required
    for line in required:
        assert re.fullmatch(r"[\w-]+==[\d.]+", line)
        assert line in pinned
