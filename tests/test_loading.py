"""Loading of a model: device, precision, and models that are refused."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import CLIPTextModel

import handler
from src.errors import StartError
from src.generation.attention import FusedSlicedAttnProcessor
from src.model import cuda_driver
from src.settings import DEFAULT_MODEL_ID, DEFAULT_MODEL_REVISION, Settings
from tests.support.engines import build, pipe_of
from tests.support.layouts import edit, halve, rewrite, set_scheduler, weight_file


def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has PyTorch say that there is a CUDA device; a build for CUDA must not ask it anything."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: [])


@pytest.fixture
def copy(v1_4_repository: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(v1_4_repository, tmp_path / "copy"))


def slices(pipe: StableDiffusionPipeline) -> set[int]:
    """In how many steps attention is computed."""
    processors = pipe.unet.attn_processors.values()
    assert {type(processor) for processor in processors} == {FusedSlicedAttnProcessor}
    return {processor.steps for processor in processors}


def load(**settings: Any) -> StableDiffusionPipeline:
    return pipe_of(build(**settings))


def test_old_repository_loads_in_float32_with_attention_slicing_on_a_cpu(v1_4_repository: Path):
    engine = build(v1_4_repository)
    pipe = pipe_of(engine)
    parts = [pipe.unet, pipe.vae, pipe.text_encoder, pipe.safety_checker]
    assert {part.dtype for part in parts} == {torch.float32}
    assert {part.device.type for part in parts} == {"cpu"}
    assert slices(pipe) == {2}
    assert engine.limits.native_size == 64
    assert engine.model_name == v1_4_repository.name


def test_attention_slicing_can_be_turned_off_or_up(v1_4_repository: Path):
    assert slices(load(model_id=v1_4_repository, attention_slicing="off")) == {1}
    # one for each head
    assert slices(load(model_id=v1_4_repository, attention_slicing="max")) == {8}


def test_safety_checker_can_be_turned_off(copy: Path):
    shutil.rmtree(copy / "safety_checker")
    shutil.rmtree(copy / "feature_extractor")
    assert load(model_id=copy, safety_checker=False).safety_checker is None


def test_weights_are_loaded_in_float16_onto_a_gpu(v1_4_repository: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []
    for model in (UNet2DConditionModel, AutoencoderKL, CLIPTextModel, StableDiffusionSafetyChecker):

        def on_cpu_after_all(*args: object, real: Callable = model.from_pretrained, **kwargs: object) -> object:
            asked.append((kwargs["dtype"], kwargs["device_map"], kwargs["use_safetensors"]))
            return real(*args, **kwargs | {"device_map": "cpu"})

        monkeypatch.setattr(model, "from_pretrained", on_cpu_after_all)
    pretend_cuda(monkeypatch)
    pipe = load(model_id=v1_4_repository)
    assert asked == [(torch.float16, "cuda", True)] * 4
    parts = (pipe.unet, pipe.vae, pipe.text_encoder, pipe.safety_checker)
    assert {part.dtype for part in parts} == {torch.float16}


def test_default_model_is_pinned_v1_4_on_a_gpu_and_the_embedded_one_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
):
    asked = []

    def nowhere(repo_id: str, **kwargs: object) -> str:
        asked.append((repo_id, kwargs["revision"]))
        raise LocalEntryNotFoundError("not here")

    monkeypatch.setattr("src.model.hub.snapshot_download", nowhere)
    assert build(None).model_name == "demo"
    monkeypatch.setattr(cuda_driver, "shows_device", lambda: True)
    pretend_cuda(monkeypatch)
    with pytest.raises(StartError):
        build(None)
    assert set(asked) == {(DEFAULT_MODEL_ID, DEFAULT_MODEL_REVISION)}


def test_worker_without_a_gpu_starts_only_with_the_embedded_model_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RUNPOD_WEBHOOK_GET_JOB", "http://localhost/job-take/$ID")
    for settings in (Settings(), Settings(model_id=DEFAULT_MODEL_ID)):
        with pytest.raises(StartError, match=r"^no CUDA device: .*MODEL_ID=demo$"):
            handler.build_engine(settings)
    assert build("demo").model_name == "demo"


def test_float16_files_are_loaded_in_float32_on_a_cpu(copy: Path):
    halve(copy, keep=False)
    pipe = load(model_id=copy)
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.safety_checker)} == {torch.float32}


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_weights_that_are_cut_off_in_a_directory_are_named_and_no_restart_is_tried(copy: Path, file: str):
    os.truncate(copy / file, (copy / file).stat().st_size // 2)
    with pytest.raises(StartError, match=rf"^MODEL_ID={copy}: {file}: cut off at .+$") as refused:
        load(model_id=copy)
    assert not refused.value.may_recover


@pytest.mark.parametrize("damaged", ["unet/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json"])
def test_damaged_file_is_reported_in_one_line_and_a_restart_is_tried_if_it_is_in_a_cache(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
):
    monkeypatch.setattr("src.model.hub.RUNPOD_CACHE", tmp_path / "cache")
    snapshot = tmp_path / "cache" / "models--someone--tiny" / "snapshots" / "commit"
    (copy / damaged).write_bytes(b"{")
    shutil.copytree(copy, snapshot)
    with pytest.raises(StartError, match=r"^MODEL_ID=someone/tiny: cannot be loaded: .+$") as refused:
        load(model_id="someone/tiny")
    # the file may be intact on another host
    assert refused.value.may_recover
    with pytest.raises(StartError, match=rf"^MODEL_ID={copy}: .+$") as refused:
        load(model_id=copy)
    assert not refused.value.may_recover


def without(component: str, tensor: str) -> Callable[[Path], None]:
    def drop(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensors[name] for name in tensors if name != tensor}

    return lambda folder: rewrite(weight_file(folder, component), drop)


FILE = "scheduler/scheduler_config.json"


def more_tokens(folder: Path) -> None:
    (folder / "tokenizer" / "added_tokens.json").write_text('{"<cat>": 514}')


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            without("text_encoder", "encoder.layers.0.mlp.fc1.weight"),
            "text_encoder/model.safetensors lacks tensors of CLIPTextModel: encoder.layers.0.mlp.fc1.weight",
        ),
        (
            without("safety_checker", "concept_embeds"),
            "safety_checker/model.safetensors lacks tensors of StableDiffusionSafetyChecker: concept_embeds",
        ),
        (
            without("unet", "conv_in.bias"),
            "unet/diffusion_pytorch_model.safetensors lacks tensors of UNet2DConditionModel",
        ),
        (
            without("vae", "decoder.conv_in.bias"),
            "vae/diffusion_pytorch_model.safetensors lacks tensors of AutoencoderKL",
        ),
        (
            lambda folder: edit(folder, "tokenizer/tokenizer_config.json", model_max_length=None),
            "tokenizer/tokenizer_config.json: model_max_length must be at most 77, got none",
        ),
        (
            more_tokens,
            "tokenizer has tokens up to 514, text_encoder has embeddings up to 513 only: "
            "save it again after resize_token_embeddings",
        ),
        (
            lambda folder: set_scheduler(folder, "EDMEulerScheduler"),
            f"{FILE}: EDMEulerScheduler cannot run this model: it has no betas",
        ),
        (
            lambda folder: set_scheduler(folder, "DPMSolverSDEScheduler", beta_start=0.00085),
            f"{FILE}: DPMSolverSDEScheduler cannot run this model: ImportError: DPMSolverSDEScheduler requires the "
            "torchsde library but it was not found in your environment. You can install it with pip: `pip install "
            "torchsde`",
        ),
        (
            lambda folder: set_scheduler(folder, "DDIMScheduler", beta_schedule="sigmoid"),
            f"{FILE}: DDIMScheduler cannot run this model: NotImplementedError: sigmoid is not implemented for "
            "<class 'diffusers.schedulers.scheduling_ddim.DDIMScheduler'>",
        ),
        (
            lambda folder: edit(folder, FILE, prediction_type="sample"),
            f"{FILE}: PNDMScheduler cannot run this model: ValueError: prediction_type given as sample must be one of "
            "`epsilon` or `v_prediction`",
        ),
        (
            lambda folder: set_scheduler(folder, "DPMSolverMultistepScheduler", algorithm_type="deis"),
            f"{FILE}: DPMSolverMultistepScheduler cannot run this model: ValueError: `final_sigmas_type` zero is not "
            "supported for `algorithm_type` deis. Please choose `sigma_min` instead.",
        ),
    ],
)
def test_model_that_would_make_other_pictures_is_refused(copy: Path, damage: Callable[[Path], None], said: str):
    damage(copy)
    with pytest.raises(StartError) as refused:
        load(model_id=copy)
    assert str(refused.value) == f"MODEL_ID={copy}: {said}"
    assert not refused.value.may_recover


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("CUDA error")])
def test_failure_of_the_card_while_a_directory_is_loaded_may_not_happen_on_another_host(
    copy: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", fail)
    with pytest.raises(StartError, match=f"^MODEL_ID={copy}: cannot be loaded: {type(error).__name__}: ") as refused:
        load(model_id=copy)
    assert refused.value.may_recover
