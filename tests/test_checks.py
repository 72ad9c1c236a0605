"""Unsupported models are refused in one line before their weights are read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPTokenizer

from src.errors import StartError
from src.model import loading, repository
from src.settings import Settings
from tests.support.layouts import edit, weight_file

Damage = Callable[[Path], object]


def config(name: str, **changes: Any) -> Damage:
    return lambda folder: edit(folder, name, **changes)


def index_entry(component: str, value: object) -> Damage:
    def write(folder: Path) -> None:
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {component: value}))

    return write


def renamed(component: str, name: str) -> Damage:
    """Leaves the component's weights in one form only."""

    def rename(folder: Path) -> None:
        weights = weight_file(folder, component)
        for file in weights.parent.glob("*.bin"):
            file.unlink()
        weights.rename(weights.with_name(name))

    return rename


def single_file(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    (folder / "dreamer_v8.safetensors").touch()


def without_feature_extractor(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    del index["feature_extractor"]
    (folder / "model_index.json").write_text(json.dumps(index))


def pointer(folder: Path) -> None:
    """As git leaves it without Git LFS."""
    weight_file(folder, "unet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n")


ADD_IT = "safety_checker needs a CLIPImageProcessor: add it, or set SAFETY_CHECKER=false"
UNET = "unet/diffusion_pytorch_model.safetensors"
PICKLED = "pickled weights can run code, and are not read: save the model again with diffusers (save_pretrained)"
RENAME = "if these are the weights that you want, give them that name"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "not a diffusers pipeline: it has no model_index.json"),
        (
            single_file,
            "not a diffusers pipeline: it has no model_index.json; for a single file, add its name, such as "
            "dreamer_v8.safetensors",
        ),
        (
            lambda folder: (folder / "model_index.json").write_text("{"),
            "cannot read model_index.json: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
        (
            lambda folder: (folder / "model_index.json").write_text("[]"),
            "cannot read model_index.json: it holds no JSON object",
        ),
        (
            index_entry("_class_name", "StableDiffusionXLPipeline"),
            "a StableDiffusionXLPipeline, this worker runs a StableDiffusionPipeline (Stable Diffusion 1.x and 2.x)",
        ),
        (
            index_entry("safety_checker", None),
            "model_index.json: safety_checker must be a pair, [null, null] for none, got null",
        ),
        (index_entry("vae", [None, None]), "model_index.json names no vae"),
        (
            index_entry("text_encoder", ["transformers", "T5EncoderModel"]),
            "text_encoder is a T5EncoderModel, this worker runs a CLIPTextModel",
        ),
        (lambda folder: shutil.rmtree(folder / "vae"), "vae/config.json is missing"),
        (lambda folder: (folder / "vae" / "config.json").write_text("{"), "cannot read vae/config.json: Expecting "),
        (
            lambda folder: (folder / "scheduler" / "scheduler_config.json").unlink(),
            "scheduler/scheduler_config.json is missing",
        ),
        (
            lambda folder: weight_file(folder, "unet").unlink(),
            f"{UNET} is missing (diffusion_pytorch_model.bin is there; {PICKLED})",
        ),
        (
            renamed("unet", "diffusion_pytorch_model.non_ema.safetensors"),
            f"{UNET} is missing (diffusion_pytorch_model.non_ema.safetensors is there; {RENAME})",
        ),
        (
            renamed("unet", "diffusion_pytorch_model-00001-of-00002.safetensors"),
            f"{UNET} is missing (diffusion_pytorch_model-00001-of-00002.safetensors is there; shards are not read: "
            "save the model again in one file (save_pretrained, max_shard_size))",
        ),
        (
            renamed("text_encoder", "pytorch_model.safetensors"),
            f"text_encoder/model.safetensors is missing (pytorch_model.safetensors is there; {RENAME})",
        ),
        (renamed("vae", "readme.txt"), "vae/diffusion_pytorch_model.safetensors is missing"),
        (
            config("unet/config.json", in_channels=8),
            "unet/config.json: in_channels must be 4, or 9 for inpainting, got 8: "
            "models for editing are other pipelines",
        ),
        (
            config("unet/config.json", sample_size=[64, 64]),
            "unet/config.json: sample_size must be one integer, such as 64, got [64, 64]",
        ),
        (
            config("unet/config.json", sample_size=None),
            "unet/config.json: sample_size must be one integer, such as 64, got null",
        ),
        (
            config("text_encoder/config.json", hidden_size=1024),
            "text_encoder/config.json: hidden_size is 1024, but unet/config.json wants 32: the text encoder is another "
            "model's",
        ),
        (pointer, f"{UNET} is a Git LFS pointer, not the weights: fetch them with git lfs pull"),
        (without_feature_extractor, f"model_index.json names no feature_extractor, {ADD_IT}"),
        (
            index_entry("feature_extractor", [None, None]),
            f"model_index.json names no feature_extractor, {ADD_IT}",
        ),
        (
            lambda folder: shutil.rmtree(folder / "feature_extractor"),
            f"feature_extractor/preprocessor_config.json is missing, {ADD_IT}",
        ),
        *(
            (lambda folder, name=name: (folder / name).unlink(), f"{name} is missing")
            for name in (
                "safety_checker/config.json",
                "tokenizer/tokenizer_config.json",
                "tokenizer/vocab.json",
                "tokenizer/merges.txt",
            )
        ),
        (lambda folder: (folder / "tokenizer" / "merges.txt").write_text(""), "tokenizer/merges.txt is empty"),
        *(
            (lambda folder, name=name: (folder / name).write_text("[]"), f"cannot read {name}: it holds no JSON object")
            for name in (
                "safety_checker/config.json",
                "feature_extractor/preprocessor_config.json",
                "tokenizer/tokenizer_config.json",
            )
        ),
        (
            index_entry("feature_extractor", ["transformers", "CLIPProcessor"]),
            f"feature_extractor is a CLIPProcessor, {ADD_IT}",
        ),
        (
            index_entry("feature_extractor", ["transformers", "CLIPImageProcessorFast"]),
            f"feature_extractor is a CLIPImageProcessorFast, {ADD_IT}",
        ),
        (
            config("scheduler/scheduler_config.json", skip_prk_steps=None),
            "scheduler/scheduler_config.json: skip_prk_steps of PNDMScheduler must be true, as Stable Diffusion has it",
        ),
    ],
)
def test_model_is_refused_in_one_line(v1_4_repository: Path, tmp_path: Path, damage: Damage, said: str):
    folder = tmp_path / "copy"
    shutil.copytree(v1_4_repository, folder)
    damage(folder)
    with pytest.raises(StartError) as refused:
        repository.find(Settings(model_id=str(folder)))
    line = str(refused.value)
    assert line.startswith(f"MODEL_ID={folder}: {said}") if said.endswith(" ") else line == f"MODEL_ID={folder}: {said}"
    assert "\n" not in line
    # it is the same on every host
    assert not refused.value.may_recover


def test_tokenizer_in_one_file_is_enough(v1_4_repository: Path, tmp_path: Path):
    folder = Path(shutil.copytree(v1_4_repository, tmp_path / "copy"))
    CLIPTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(folder / "tokenizer")
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)
    settings = Settings(model_id=str(folder))
    prompt = "a cat"
    tokens = loading.load(repository.find(settings), "cpu", settings).tokenizer(prompt).input_ids
    assert tokens == CLIPTokenizer.from_pretrained(v1_4_repository / "tokenizer")(prompt).input_ids
