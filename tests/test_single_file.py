"""Models in one file: checkpoints as Civitai and the hub hand them out, and what is none."""

import os
import shutil
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

import handler
from src.errors import StartError
from src.model import loading, repository
from src.settings import DEFAULT_MODEL_ID, Settings
from tests.support import forks, hub
from tests.support.engines import build, generate, pipe_of
from tests.support.layouts import inpainting, v2_1, weight_file
from tests.support.single_files import make_checkpoint

REPO = "someone/tiny"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def checkpoint(v1_4_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(v1_4_repository, tmp_path_factory.mktemp("files") / "dreamer_8.safetensors")


@pytest.fixture(scope="module")
def v2_1_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v2") / "model"
    v2_1(folder)
    return folder


@pytest.mark.parametrize("version", ["v1_4_repository", "v2_1_repository"])
def test_checkpoint_gives_the_picture_of_the_directory(version: str, tmp_path: Path, request: pytest.FixtureRequest):
    folder = request.getfixturevalue(version)
    file = make_checkpoint(folder, tmp_path / "my model.v2.safetensors", ema=True)
    engine = build(file, base_model=str(folder))
    ours, theirs = (generate(each).pictures[0].image for each in (engine, build(folder)))
    assert ours.tobytes() == theirs.tobytes()
    assert engine.model_name == "my model.v2"


def test_checkpoint_for_inpainting_is_read_with_such_a_base(tmp_path: Path):
    inpainting(tmp_path / "base")
    file = make_checkpoint(tmp_path / "base", tmp_path / "painter.safetensors")
    ours, theirs = (
        pipe_of(build(model_id, base_model=str(tmp_path / "base"))).unet.state_dict()
        for model_id in (file, tmp_path / "base")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("loaded", [torch.float32, torch.float16])
@pytest.mark.parametrize("saved", FLOATS)
def test_every_tensor_is_that_of_the_directory(
    v1_4_repository: Path, tmp_path: Path, saved: torch.dtype, loaded: torch.dtype
):
    file = make_checkpoint(v1_4_repository, tmp_path / "dreamer.safetensors", saved)
    settings = Settings(model_id=str(file), base_model=str(v1_4_repository))
    ours = pipe_of(handler.build_engine(settings, loaded))
    theirs = StableDiffusionPipeline.from_pretrained(v1_4_repository)
    for part in ("unet", "vae", "text_encoder", "safety_checker"):
        tensors, expected = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            # the checker is the directory's own
            through = expected[name] if part == "safety_checker" else expected[name].to(saved)
            assert torch.equal(tensor, through.to(loaded)), name


def test_weights_go_straight_to_the_gpu(checkpoint: Path, v1_4_repository: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[object] = []
    for model in (UNet2DConditionModel, AutoencoderKL):

        def on_cpu_after_all(*args: object, real: Callable = model.from_single_file, **kwargs: object) -> object:
            asked.append((kwargs["dtype"], kwargs["device"]))
            return real(*args, **kwargs | {"device": "cpu"})

        monkeypatch.setattr(model, "from_single_file", on_cpu_after_all)

    def to(model: CLIPTextModel, target: object, real: Callable = CLIPTextModel.to) -> CLIPTextModel:
        asked.append(target)
        return real(model, "cpu" if target == "cuda" else target)

    monkeypatch.setattr(CLIPTextModel, "to", to)
    settings = Settings(model_id=str(checkpoint), base_model=str(v1_4_repository), safety_checker=False)
    loading.load(repository.find(settings), "cuda", settings)
    assert asked == [(torch.float16, "cuda"), (torch.float16, "cuda"), torch.float16, "cuda"]


def test_checkpoint_and_checker_are_read_ahead(checkpoint: Path, v1_4_repository: Path):
    found = repository.find_local(Settings(model_id=str(checkpoint), base_model=str(v1_4_repository)))
    assert found and found.weight_files == [checkpoint, weight_file(v1_4_repository, "safety_checker")]
    assert "dreamer_8.safetensors, all but its weights from " in found.where


Write = Callable[[Path], object]


def tensors(*names: str, shape: Iterable[int] = (1,)) -> Write:
    return lambda file: save_file({name: torch.zeros(*shape) for name in names}, file)


def content(begin: bytes) -> Write:
    return lambda file: file.write_bytes(begin + b"x" * 1000)


def changed(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Write:
    """A checkpoint with changed tensors."""
    return lambda file: save_file(change(load_file(file.parent / "checkpoint")), file)


def without(prefix: str) -> Write:
    return changed(lambda tensors: {name: tensors[name] for name in tensors if not name.startswith(prefix)})


def with_channels(count: int) -> Write:
    first = "model.diffusion_model.input_blocks.0.0.weight"
    return changed(lambda tensors: tensors | {first: torch.zeros(32, count, 3, 3)})


def cut_off(file: Path) -> None:
    file.write_bytes((file.parent / "checkpoint").read_bytes()[:-1])


def of_version_2(file: Path) -> None:
    v2_1(file.parent / "v2")
    make_checkpoint(file.parent / "v2", file)


COMPONENT = "of a diffusers directory: MODEL_ID must be the directory"
RUNS = "this worker runs Stable Diffusion 1.x and 2.x"
PICKLED = "pickled weights can run code, and are not read"


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (
            content(b"version https://git-lfs.github.com/spec/v1\n"),
            "a Git LFS pointer, not the weights: fetch them with",
        ),
        (content(b"<!DOCTYPE html><html>"), "a site's answer, not the weights: download them again"),
        (content(b'{"error":"Unauthorized"}'), "a site's answer, not the weights: download them again"),
        (content(b"PK\x03\x04"), PICKLED),
        (content(b"\x80\x02\x8a\nl"), PICKLED),
        (content(b"GGUF"), "a GGUF file, which is not read: use the model's .safetensors file"),
        (cut_off, "cut off at "),
        (content(struct.pack("<Q", 5000) + b"{"), "cut off at 1,009 bytes"),
        (Path.touch, "cut off at 0 bytes"),
        (tensors("lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"), "a LoRA: set LORA to it"),
        (tensors("unet.mid_block.attentions.0.proj_in.lora_A.weight"), "a LoRA: set LORA to it"),
        (tensors("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a"), "a LoRA: set LORA to it"),
        (tensors("model.diffusion_model.label_emb.0.0.weight", "conditioner.embedders.0.x"), "a Stable Diffusion XL"),
        (tensors("model.diffusion_model.joint_blocks.0.x"), f"a Stable Diffusion 3 checkpoint, {RUNS}"),
        (tensors("double_blocks.0.img_attn.norm.key_norm.scale"), f"a Flux checkpoint, {RUNS}"),
        (tensors("control_model.time_embed.0.weight"), "a ControlNet, which is not used here"),
        (tensors("emb_params"), "a textual inversion: add it to a directory with diffusers (load_textual_inversion, "),
        (tensors("something.else"), f"no checkpoint of a kind that is known here, {RUNS}"),
        *(
            (lambda file, part=part: shutil.copy(weight_file(file.parent / "directory", part), file), said)
            for part, said in {
                "unet": f"the UNet {COMPONENT}",
                "vae": f"a VAE, or that {COMPONENT}",
                "text_encoder": f"the text encoder {COMPONENT}",
                "safety_checker": f"the safety checker {COMPONENT}",
            }.items()
        ),
        (
            without("model.diffusion_model.input_blocks.0.0.weight"),
            f"a checkpoint that lacks tensors of its UNet, or of another kind: {RUNS}",
        ),
        (without("first_stage_model."), "a checkpoint without a VAE: use one with all parts"),
        (without("cond_stage_model."), "a checkpoint without a text encoder that diffusers can read: use one with all"),
        (with_channels(9), "a checkpoint for inpainting: its UNet has 9 input channels, that of BASE_MODEL 4"),
        (
            of_version_2,
            "a checkpoint of another model (a context of 40 channels), BASE_MODEL is another model (a context",
        ),
    ],
)
def test_any_other_file_is_refused_in_one_line(
    checkpoint: Path, v1_4_repository: Path, tmp_path: Path, write: Write, said: str
):
    (tmp_path / "checkpoint").symlink_to(checkpoint)
    (tmp_path / "directory").symlink_to(v1_4_repository)
    file = tmp_path / "file.safetensors"
    write(file)
    with pytest.raises(StartError) as refused:
        repository.find_local(Settings(model_id=str(file), base_model=str(v1_4_repository)))
    assert str(refused.value).startswith(f"MODEL_ID={file}: {said}")
    assert "\n" not in str(refused.value)
    assert not refused.value.may_recover


def test_checkpoint_that_lacks_a_tensor_is_refused(checkpoint: Path, v1_4_repository: Path, tmp_path: Path):
    for name in ("model.diffusion_model.out.2.bias", "cond_stage_model.transformer.text_model.final_layer_norm.bias"):
        (tmp_path / "checkpoint").unlink(missing_ok=True)
        (tmp_path / "checkpoint").symlink_to(checkpoint)
        without(name)(tmp_path / "file.safetensors")
        with pytest.raises(StartError, match="it lacks tensors of its UNet, VAE or text encoder"):
            build(tmp_path / "file.safetensors", base_model=str(v1_4_repository))


def test_file_that_this_user_may_not_read_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != checkpoint)
    with pytest.raises(StartError, match=f"^MODEL_ID={checkpoint}: it may not be read by this user$"):
        repository.find_local(Settings(model_id=str(checkpoint)))


def test_a_files_ending_must_be_its_kind(checkpoint: Path, tmp_path: Path):
    (tmp_path / "dreamer.ckpt").symlink_to(checkpoint)
    with pytest.raises(StartError, match=r"dreamer\.ckpt: its name must end with \.safetensors$"):
        repository.find_local(Settings(model_id=str(tmp_path / "dreamer.ckpt")))


def test_fault_of_the_base_model_is_told_by_its_name(
    checkpoint: Path, v1_4_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def said(base_model: str | None) -> str:
        with pytest.raises(StartError) as refused:
            repository.find(Settings(model_id=str(checkpoint), base_model=base_model))
        return str(refused.value)

    begin = f"MODEL_ID={checkpoint}: BASE_MODEL="
    assert said("/nowhere") == f"{begin}/nowhere: no such file or directory"
    assert said(str(tmp_path)).startswith(f"{begin}{tmp_path}: not a diffusers pipeline")
    assert said(str(checkpoint)) == f"{begin}{checkpoint}: a file: name a directory or hub id"
    assert said("Demo") == f"{begin}demo: the embedded model is no base for others: name a directory or hub id"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert said(None).startswith(
        f"{begin}{DEFAULT_MODEL_ID}: in no local cache, and HF_HUB_OFFLINE=1 forbids a download"
    )


def test_checkpoint_of_version_2_asks_for_a_base_model_before_v1_4_is_looked_for(tmp_path: Path):
    names = ("input_blocks.0.0.weight", "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    unet = {f"model.diffusion_model.{name}": torch.zeros(1, 1024) for name in names}
    others = ("first_stage_model.x", "cond_stage_model.model.token_embedding.weight")
    save_file(unet | {name: torch.zeros(1) for name in others}, tmp_path / "v2.safetensors")
    with pytest.raises(StartError, match=r": a checkpoint of Stable Diffusion 2\.x: set BASE_MODEL to a directory or"):
        repository.find_local(Settings(model_id=str(tmp_path / "v2.safetensors")))


def test_base_model_needs_no_weights_but_the_checkers(checkpoint: Path, v1_4_repository: Path, tmp_path: Path):
    base = Path(shutil.copytree(v1_4_repository, tmp_path / "base"))
    for part in ("unet", "vae", "text_encoder"):
        weight_file(base, part).unlink()
    assert build(checkpoint, base_model=str(base)).model_name == "dreamer_8"
    weight_file(base, "safety_checker").unlink()
    with pytest.raises(StartError, match=r"BASE_MODEL=.*: safety_checker/model\.safetensors is missing"):
        build(checkpoint, base_model=str(base))
    assert pipe_of(build(checkpoint, base_model=str(base), safety_checker=False)).safety_checker is None


def find(model_id: str, **environment: str) -> str:
    """Runs ``repository.find`` in a process of its own, since huggingface_hub reads its environment only once."""
    code = (
        "from pathlib import Path; from src.errors import StartError\n"
        "from src.model import hub, repository; from src.settings import Settings\n"
        f"hub.RUNPOD_CACHE = Path({environment.pop('runpod_cache', '/nowhere')!r})\n"
        "try: found = repository.find(Settings.from_environment()); print(found, found.where, sep=', ')\n"
        "except StartError as error: print('refused:', error)"
    )
    return forks.python(code, MODEL_ID=model_id, **environment)


@pytest.mark.process
def test_checkpoint_on_the_hub_is_downloaded_once_with_the_small_files_of_its_base(
    checkpoint: Path, v1_4_repository: Path, tmp_path: Path
):
    file = "models/dreamer [v8].safetensors"
    folder, model_id = Path(shutil.copytree(v1_4_repository, tmp_path / "hub")), f"{REPO}/{file}"
    (folder / "models").mkdir()
    shutil.copy(checkpoint, folder / file)
    environment = {"HF_HOME": str(tmp_path / "home"), "BASE_MODEL": REPO}
    at = f"dreamer [v8] at {hub.REVISION[:12]}"
    with hub.serve(REPO, folder) as (address, fetched):
        online = environment | {"HF_ENDPOINT": address}
        assert (
            find(model_id, **online)
            == f"{at}, downloaded, all but its weights from {REPO} at 0123456789ab, downloaded\n"
        )
        weights = [name for name in fetched if "safetensors" in name]
        assert weights == [
            # once to see whether it can be used, and again before it is downloaded
            f"{file}:0-100000",
            f"{file}:0-100000",
            file,
            "safety_checker/model.safetensors",
        ]
        fetched.clear()
        assert "from Hugging Face" not in find(model_id, **online, MODEL_REVISION="nope")
        assert find(f"{REPO}/nothing.safetensors", **online).endswith(f": {REPO} has no file nothing.safetensors\n")
    cached = f"{at}, Hugging Face cache, all but its weights from {REPO} at 0123456789ab, Hugging Face cache\n"
    assert find(model_id, HF_HUB_OFFLINE="1", **environment) == cached
    runpod = find(
        model_id, HF_HUB_OFFLINE="1", HF_HOME="/nowhere", BASE_MODEL=REPO, runpod_cache=str(tmp_path / "home" / "hub")
    )
    assert runpod == cached.replace("Hugging Face cache", "RunPod's cached models")


@pytest.mark.process
def test_what_is_no_checkpoint_is_refused_before_it_is_downloaded(tmp_path: Path):
    save_file({"conditioner.embedders.0.x": torch.zeros(1000, 1000)}, tmp_path / "sdxl.safetensors")
    with hub.serve(REPO, tmp_path) as (address, fetched):
        said = find(f"{REPO}/sdxl.safetensors", HF_HOME=str(tmp_path / "home"), HF_ENDPOINT=address)
    assert said.startswith(f"refused: MODEL_ID={REPO}/sdxl.safetensors: a Stable Diffusion XL checkpoint, {RUNS}")
    assert fetched == ["sdxl.safetensors:0-100000"]
