import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from src.model import repository
from src.model.checks import WEIGHTS
from src.settings import Settings
from tests.support import engines, forks, hub
from tests.support.layouts import halve, weight_file
from tests.support.single_files import make_checkpoint

pytestmark = pytest.mark.process

REPO = "someone/tiny"


def fetch(
    output: Path, address: str, home: Path, *, model: str = REPO, revision: str = hub.REVISION, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = ["builder.fetch_model", "--model", model, "--base", REPO, "--revision", revision, "--output", str(output)]
    return forks.run_module(*command, **{"HF_ENDPOINT": address, "HF_HOME": str(home)} | environment)


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


def test_checkpoint_is_baked_as_a_whole_model(v1_4_repository: Path, tmp_path: Path):
    folder, output = Path(shutil.copytree(v1_4_repository, tmp_path / "repository")), tmp_path / "model"
    (folder / "more").mkdir()
    make_checkpoint(folder, folder / "more" / "dreamer_8.safetensors")
    (folder / "LICENSE").write_text("the checkpoint's")
    with hub.serve(REPO, folder) as (address, _):
        ran = fetch(output, address, tmp_path / "home", model=f"{REPO}/more/dreamer_8.safetensors")
    assert ran.returncode == 0, ran.stderr
    found = repository.find(Settings(model_id=str(output)))
    assert (found.name, found.revision) == ("dreamer_8", hub.REVISION)
    assert (output / "LICENSE").read_text() == "the checkpoint's"
    for component in WEIGHTS:
        baked, whole = (load_file(weight_file(each, component)) for each in (output, folder))
        assert all(torch.equal(baked[name], whole[name].half()) for name in baked)


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


@pytest.mark.parametrize(
    ("revision", "said"),
    [
        ("nope", f"MODEL_ID={REPO}, MODEL_REVISION=nope: the hub has no such revision"),
        (hub.REVISION, "cannot save it in float16: .*Not a directory"),
    ],
)
def test_failed_fetch_explains_itself_and_leaves_nothing(
    v1_4_repository: Path, tmp_path: Path, revision: str, said: str
):
    output = tmp_path / "output" / "model"
    output.parent.mkdir()
    # what is found only when the copy is complete
    output.touch()
    with hub.serve(REPO, v1_4_repository) as (address, _):
        ran = fetch(output, address, tmp_path / "home", revision=revision)
    assert ran.returncode == 1
    assert re.match(f"cannot fetch the model: {said}", ran.stderr.splitlines()[-1])
    assert list(output.parent.iterdir()) == [output]
