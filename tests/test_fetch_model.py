import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from src.model import repository
from src.model.checks import WEIGHTS
from src.settings import Settings
from tests.support import engines, forks, hub
from tests.support.layouts import halve, weight_file
from tests.support.processes import ROOT

pytestmark = pytest.mark.process

REPO = "someone/tiny"


def fetch(
    output: Path, address: str, home: Path, *, revision: str = hub.REVISION, around: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs the command within the shell command ``around``, in the place of ``"$@"``."""
    environment = {"HF_ENDPOINT": address, "HF_HOME": str(home)} | environment
    command = ["builder.fetch_model", "--model", REPO, "--revision", revision, "--output", str(output)]
    if not around:
        return forks.run_module(*command, **environment)
    return subprocess.run(
        ["sh", "-c", around, "sh", sys.executable, "-m", *command],
        cwd=ROOT,
        env=os.environ | environment,
        text=True,
        capture_output=True,
    )


def test_model_is_baked_in_float16_with_its_origin(v1_4_repository: Path, tmp_path: Path):
    output = tmp_path / "model"
    with hub.serve(REPO, v1_4_repository) as (address, fetched):
        ran = fetch(output, address, tmp_path / "home")
    assert ran.returncode == 0, ran.stderr
    assert not [name for name in fetched if name.endswith(".bin")]
    kept = {path.relative_to(output).as_posix() for path in output.rglob("*.*")}
    assert not [name for name in kept if name.endswith(".bin")]
    assert all(path.stat().st_mode & 0o004 for path in output.rglob("*")), "the image's user cannot read it"
    tensors = load_file(output / "unet" / "diffusion_pytorch_model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.float16}
    found = repository.find(Settings(model_id=str(output)))
    assert (found.name, found.revision) == (REPO, hub.REVISION)
    assert engines.pipe_of(engines.build(output)).safety_checker is not None


def test_float16_files_are_baked_unchanged_with_licence_and_card(v1_4_repository: Path, tmp_path: Path):
    folder, output = Path(shutil.copytree(v1_4_repository, tmp_path / "repository")), tmp_path / "model"
    halve(folder)
    for name in ("LICENSE.md", "README.md"):
        (folder / name).write_text(f"the model's {name}")
    with hub.serve(REPO, folder) as (address, fetched):
        ran = fetch(output, address, tmp_path / "home")
    assert ran.returncode == 0, ran.stderr
    assert all(".fp16." in name for name in fetched if name.endswith(".safetensors"))
    assert {name: (output / name).read_text() for name in ("LICENSE.md", "README.md")} == {
        "LICENSE.md": "the model's LICENSE.md",
        "README.md": "the model's README.md",
    }
    assert all(path.stat().st_mode & 0o004 for path in output.rglob("*"))
    for component in WEIGHTS:
        half, baked = (
            load_file(file)
            for file in (
                weight_file(folder, component).with_suffix(".fp16.safetensors"),
                weight_file(output, component),
            )
        )
        assert half.keys() == baked.keys()
        assert all(torch.equal(half[name], baked[name]) for name in half)


def test_gated_model_is_fetched_with_a_token_that_is_stored_nowhere(v1_4_repository: Path, tmp_path: Path):
    (tmp_path / "token").write_text("hf_right\n")
    with hub.serve(REPO, v1_4_repository, token="hf_right") as (address, _):
        ran = fetch(tmp_path / "model", address, tmp_path / "home", HF_TOKEN_PATH=str(tmp_path / "token"))
    assert ran.returncode == 0, ran.stderr
    (tmp_path / "token").unlink()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if b"hf_right" in path.read_bytes()]
    assert "hf_right" not in ran.stdout + ran.stderr


def without_safetensors(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        path.unlink()


def with_a_damaged_file(folder: Path) -> None:
    (folder / "vae" / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "token", "revision", "said"),
    [
        (None, None, "nope", f"MODEL_ID={REPO}, MODEL_REVISION=nope: the hub has no such revision"),
        (
            None,
            "hf_right",
            hub.REVISION,
            f"MODEL_ID={REPO}, MODEL_REVISION={hub.REVISION}: gated: accept its licence on the hub and",
        ),
        (
            without_safetensors,
            None,
            hub.REVISION,
            ".*: unet/diffusion_pytorch_model.safetensors is missing .*; pickled weights",
        ),
        (
            with_a_damaged_file,
            None,
            hub.REVISION,
            ".*: cannot read vae/config.json: ",
        ),
    ],
)
def test_failed_fetch_explains_itself_and_leaves_nothing(
    v1_4_repository: Path, tmp_path: Path, damage: Callable | None, token: str | None, revision: str, said: str
):
    folder, output = shutil.copytree(v1_4_repository, tmp_path / "repository"), tmp_path / "output"
    if damage:
        damage(folder)
    output.mkdir()
    with hub.serve(REPO, folder, token=token) as (address, _):
        ran = fetch(output / "model", address, tmp_path / "home", revision=revision, HF_TOKEN="hf_wrong")
    assert ran.returncode == 1
    assert re.match(f"cannot fetch the model: {said}", ran.stderr.splitlines()[-1])
    assert list(output.iterdir()) == []


def test_full_disk_is_reported_and_leaves_no_partial_model(v1_4_repository: Path, tmp_path: Path):
    mount = "mount -t tmpfs -o size=500k none output"
    if subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", mount.replace("output", "/mnt")]
    ).returncode:
        pytest.skip("no file system can be mounted here")
    (tmp_path / "output").mkdir()
    around = f'cd {tmp_path} && {mount} && cd {ROOT} && "$@"; echo $?; ls -A {tmp_path}/output'
    with hub.serve(REPO, v1_4_repository) as (address, _):
        ran = fetch(
            tmp_path / "output" / "model",
            address,
            tmp_path / "home",
            around=f"exec unshare --map-root-user --mount sh -c '{around}' sh \"$@\"",
        )
    assert ran.stdout.splitlines()[-1] == "1"
    assert re.match("cannot fetch the model: cannot save it in float16: .*No space left", ran.stderr.splitlines()[-1])
