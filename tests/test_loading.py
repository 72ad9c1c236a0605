"""Loading, from every place a model may lie in, and what stops the worker."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

import handler
from src.errors import StartError
from src.generation.attention import FusedSlicedAttnProcessor
from src.model import cuda_driver, repository
from src.settings import DEFAULT_MODEL_ID, DEFAULT_MODEL_REVISION, Settings
from tests.support import hub
from tests.support.engines import build, pipe_of
from tests.support.processes import python

REPO = "someone/tiny"


@pytest.fixture
def copy(v1_4_repository: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(v1_4_repository, tmp_path / "copy"))


def sliced(pipe: StableDiffusionPipeline) -> bool:
    return all(isinstance(processor, FusedSlicedAttnProcessor) for processor in pipe.unet.attn_processors.values())


def load(**settings: Any) -> StableDiffusionPipeline:
    return pipe_of(build(**settings))


def test_an_old_repository_loads_in_float32_with_attention_slicing_on_a_cpu(v1_4_repository: Path):
    engine = build(v1_4_repository)
    pipe = pipe_of(engine)
    parts = [pipe.unet, pipe.vae, pipe.text_encoder, pipe.safety_checker]
    assert {part.dtype for part in parts} == {torch.float32}
    assert {part.device.type for part in parts} == {"cpu"}
    assert sliced(pipe)
    assert engine.limits.native_size == 64
    assert engine.model_name == v1_4_repository.name


def test_attention_slicing_can_be_turned_off(v1_4_repository: Path):
    assert not sliced(load(model_id=v1_4_repository, attention_slicing="off"))
    assert sliced(load(model_id=v1_4_repository, attention_slicing="max"))


def test_the_safety_checker_can_be_turned_off(copy: Path):
    shutil.rmtree(copy / "safety_checker")
    assert load(model_id=copy, safety_checker=False).safety_checker is None


def test_float16_and_the_device_are_asked_for_where_there_is_a_gpu(
    v1_4_repository: Path, monkeypatch: pytest.MonkeyPatch
):
    real, asked = StableDiffusionPipeline.from_pretrained, []

    def on_cpu_after_all(path: Path, **kwargs: object) -> StableDiffusionPipeline:
        asked.append(kwargs | {"path": path})
        return real(path, **kwargs | {"device_map": "cpu"})

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", on_cpu_after_all)
    pipe = load(model_id=v1_4_repository)
    assert [(call["dtype"], call["device_map"], call["use_safetensors"]) for call in asked] == [
        (torch.float16, "cuda", True)
    ]
    assert pipe.unet.dtype == torch.float16


def test_the_default_model_is_v1_4_at_a_pinned_commit_on_a_gpu_and_the_embedded_one_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
):
    asked = []

    def nowhere(**kwargs: object) -> str:
        asked.append((kwargs["repo_id"], kwargs["revision"]))
        raise repository.LocalEntryNotFoundError("not here")

    monkeypatch.setattr(repository, "snapshot_download", nowhere)
    assert build(None).model_name == "demo"
    monkeypatch.setattr(cuda_driver, "shows_device", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(StartError):
        build(None)
    assert set(asked) == {(DEFAULT_MODEL_ID, DEFAULT_MODEL_REVISION)}


def test_on_runpod_without_a_gpu_only_the_embedded_model_starts_and_only_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RUNPOD_WEBHOOK_GET_JOB", "http://localhost/job-take/$ID")
    for settings in (Settings(), Settings(model_id=DEFAULT_MODEL_ID)):
        with pytest.raises(StartError, match=r"^no CUDA device: .*MODEL_ID=demo$"):
            handler.build_engine(settings)
    assert build("demo").model_name == "demo"


def remove(path: str) -> Callable[[Path], None]:
    return lambda folder: (folder / path).unlink()


def truncate(path: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        content = (folder / path).read_bytes()
        (folder / path).write_bytes(content[: len(content) // 2])

    return cut


def another_kind(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionXLPipeline"}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (remove("model_index.json"), "not a diffusers pipeline: it has no model_index.json"),
        (truncate("model_index.json"), "cannot read"),
        (another_kind, "is a StableDiffusionXLPipeline, this worker runs a StableDiffusionPipeline"),
        (remove("unet/diffusion_pytorch_model.safetensors"), "it is missing (pickled"),
        (remove("safety_checker/model.safetensors"), "it is missing (pickled"),
        (lambda folder: shutil.rmtree(folder / "vae"), "vae/diffusion_pytorch_model.safetensors: it is missing"),
        (truncate("unet/diffusion_pytorch_model.safetensors"), "cannot load model"),
        (truncate("text_encoder/model.safetensors"), "cannot load model"),
        (truncate("vae/config.json"), "cannot load model"),
        (remove("tokenizer/vocab.json"), "cannot load model"),
        (remove("scheduler/scheduler_config.json"), "cannot load model"),
    ],
)
def test_a_damaged_directory_is_refused_in_one_line(copy: Path, damage: Callable[[Path], None], said: str):
    damage(copy)
    with pytest.raises(StartError) as refused:
        load(model_id=copy)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("model_id", "said"),
    [
        ("/no/such/directory", "no such directory"),
        ("./nowhere", "no such directory"),
        ("no hub id", "neither a directory nor a hub id"),
        ("a/b/c", "neither a directory nor a hub id"),
    ],
)
def test_a_model_that_cannot_be(model_id: str, said: str):
    with pytest.raises(StartError, match=said):
        repository.find(Settings(model_id=model_id))


def find(environment: dict[str, str], *, runpod_cache: Path | None = None) -> str:
    """Runs ``repository.find`` in a process of its own, since the hub's library reads its environment at import."""
    code = (
        "from pathlib import Path; from src.errors import StartError\n"
        "from src.model import repository; from src.settings import Settings\n"
        f"repository.RUNPOD_CACHE = Path({str(runpod_cache or '/nowhere')!r})\n"
        f"try: print(repository.find(Settings.from_environment()).where)\n"
        "except StartError as error: print('refused:', error)"
    )
    return python(code, MODEL_ID=REPO, **environment)


@pytest.mark.process
def test_a_hub_id_is_downloaded_once_and_then_found_in_the_cache(v1_4_repository: Path, tmp_path: Path):
    with hub.serve(REPO, v1_4_repository) as (address, fetched):
        environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path)}
        assert find(environment | {"SAFETY_CHECKER": "false"}) == "downloaded\n"
        assert "unet/diffusion_pytorch_model.safetensors" in fetched
        assert not [name for name in fetched if name.endswith(".bin") or name.startswith("safety_checker")]
        fetched.clear()
        assert find(environment) == "downloaded\n"
        assert {name.split("/")[0] for name in fetched} == {"safety_checker", "feature_extractor"}
        fetched.clear()
        assert find(environment) == "Hugging Face cache\n"
        assert fetched == []
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    assert find(offline) == "Hugging Face cache\n"
    assert find(offline | {"HF_HOME": "/nowhere"}, runpod_cache=tmp_path / "hub") == "RunPod's cached models\n"
    assert find(offline, runpod_cache=tmp_path / "hub") == "RunPod's cached models\n"


def cached(v1_4_repository: Path, cache: Path, name: str, commit: str) -> None:
    """Adds a commit of a model to a cache, as RunPod does it: without the hub's library, and without a branch."""
    shutil.copytree(v1_4_repository, cache / f"models--{name.replace('/', '--')}" / "snapshots" / commit)


def test_the_pinned_commit_of_a_model_that_runpod_cached_is_preferred_and_another_is_logged(
    v1_4_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(repository, "RUNPOD_CACHE", tmp_path)

    def found(revision: str | None = None) -> str | None:
        found = repository.find_local(Settings(model_id=DEFAULT_MODEL_ID, model_revision=revision))
        return found and f"{found}, {found.where}"

    other = f"{DEFAULT_MODEL_ID} at {hub.REVISION[:12]}, RunPod's cached models"
    pinned = f"{DEFAULT_MODEL_ID} at {DEFAULT_MODEL_REVISION[:12]}, RunPod's cached models"
    assert found() is None
    cached(v1_4_repository, tmp_path, DEFAULT_MODEL_ID.lower(), hub.REVISION)
    assert found() == f"{other} (not the pinned commit, {DEFAULT_MODEL_REVISION[:12]})"
    assert found(hub.REVISION) == other
    assert found(DEFAULT_MODEL_REVISION) is None
    cached(v1_4_repository, tmp_path, DEFAULT_MODEL_ID, DEFAULT_MODEL_REVISION)
    assert found() == found(DEFAULT_MODEL_REVISION) == pinned


def test_of_a_model_that_runpod_cached_the_newest_usable_commit_is_taken(
    v1_4_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(repository, "RUNPOD_CACHE", tmp_path)
    for commit, changed in (("old", 1), ("new", 3), ("damaged", 4), ("middle", 2)):
        cached(v1_4_repository, tmp_path, REPO, commit)
        os.utime(tmp_path / "models--someone--tiny" / "snapshots" / commit, (changed, changed))
    (tmp_path / "models--someone--tiny" / "snapshots" / "damaged" / "model_index.json").unlink()
    found = repository.find(Settings(model_id=REPO))
    assert (found.name, found.revision, found.where) == (REPO, "new", "RunPod's cached models")


def test_what_is_wrong_with_a_cached_model_is_reported_where_none_may_be_downloaded(
    v1_4_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(repository, "RUNPOD_CACHE", tmp_path)
    cached(v1_4_repository, tmp_path, DEFAULT_MODEL_ID, DEFAULT_MODEL_REVISION)
    (weight,) = tmp_path.glob("*/snapshots/*/vae/*.safetensors")
    weight.unlink()
    assert repository.find_local(Settings(model_id=DEFAULT_MODEL_ID)) is None
    monkeypatch.setattr(repository.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StartError, match=f"^cannot use {weight}: it is missing"):
        repository.find_local(Settings(model_id=DEFAULT_MODEL_ID))


@pytest.mark.process
def test_a_broken_download_goes_on_where_it_broke(copy: Path, tmp_path: Path):
    # as much as the hub's library keeps in memory before it writes, and more
    big = copy / "unet" / "diffusion_pytorch_model.safetensors"
    big.write_bytes(os.urandom(24 * 2**20))
    with hub.serve(REPO, copy, breaks_off="unet/diffusion_pytorch_model.safetensors") as (address, fetched):
        assert find({"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}) == "downloaded\n"
    assert [name for name in fetched if name.startswith("unet/diff")] == [
        "unet/diffusion_pytorch_model.safetensors",
        f"unet/diffusion_pytorch_model.safetensors:{10 * 2**20}",
    ]
    (downloaded,) = (tmp_path / "home").glob(f"hub/*/snapshots/{hub.REVISION}/unet/{big.name}")
    assert downloaded.read_bytes() == big.read_bytes()


@pytest.mark.process
def test_what_the_hub_refuses_is_reported_in_one_line(v1_4_repository: Path, tmp_path: Path):
    home = {"HF_HOME": str(tmp_path)}
    with hub.serve(REPO, v1_4_repository) as (address, _):
        assert find(home | {"HF_ENDPOINT": address, "MODEL_REVISION": "nope"}) == (
            f"refused: {REPO} at revision nope: the hub has no such revision\n"
        )
    with hub.serve("someone/else", v1_4_repository) as (address, _):
        assert "the hub has no such model, or it is private" in find(home | {"HF_ENDPOINT": address})
    with hub.serve(REPO, v1_4_repository, token="hf_other") as (address, _):
        said = find(home | {"HF_ENDPOINT": address, "HF_TOKEN": "hf_secret"})
        assert said == f"refused: {REPO} is gated: accept its licence on the hub and set HF_TOKEN\n"
    for revision in ("main", hub.REVISION):
        unreachable = home | {"HF_ENDPOINT": "http://127.0.0.1:9", "MODEL_REVISION": revision}
        started = time.monotonic()
        assert "the hub cannot be reached" in find(unreachable)
        assert time.monotonic() - started < 15
    assert "or set HF_HUB_OFFLINE=0 to download it" in find(home | {"HF_HUB_OFFLINE": "1"})
