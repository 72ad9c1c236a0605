"""Loads the pipeline onto the device."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj

from src.errors import StartError, one_line, shortened
from src.model import cuda_driver
from src.model.checks import check_tokenizer, read_json
from src.model.places import local_path
from src.model.repository import Repository, choose_model, naming, prefixed
from src.model.single_file import read_shapes
from src.settings import DEMO_MODEL_ID, Settings, on_pod, on_runpod


def choose_device(settings: Settings) -> str:
    """Returns ``cuda`` if there is a device, otherwise ``cpu``.

    Raises:
        StartError: if PyTorch has no kernels for the device; or if there is none although one is expected: on RunPod,
            or because the driver shows one and no model was chosen.
    """
    if torch.cuda.is_available():
        if kernels := torch.cuda.get_arch_list():
            cuda_driver.check_kernels(kernels, torch.cuda.get_device_capability(), torch.cuda.get_device_name())
        return "cuda"
    expected = on_runpod() or on_pod() or (settings.model_id is None and cuda_driver.shows_device())
    if expected and settings.model_id != DEMO_MODEL_ID:
        why = cuda_driver.why_no_device(cuda_driver.find(), torch.version.cuda, os.environ.get("CUDA_VISIBLE_DEVICES"))
        raise StartError(
            f"no CUDA device: {why}. To run the embedded toy model on the CPU, set MODEL_ID={DEMO_MODEL_ID}",
            may_recover=True,
        )
    return "cpu"


def load(
    repository: Repository, device: str, settings: Settings, dtype: torch.dtype | None = None
) -> StableDiffusionPipeline:
    """Loads a model's files onto the device.

    Args:
        repository: where they are.
        device: ``cuda`` or ``cpu``.
        settings: what to call the model in an error.
        dtype: of the weights. By default float16 on a CUDA device, float32 on the CPU.

    Raises:
        StartError: if the files are damaged, or are not a model that this worker runs.
    """
    with naming(settings):
        try:
            pipe = _load(repository, device, dtype or (torch.float16 if device == "cuda" else torch.float32))
            check_tokenizer(pipe.tokenizer, pipe.text_encoder.config)
        except StartError:
            raise
        except Exception as error:
            own = local_path(choose_model(settings)).exists()
            for file in repository.weight_files if own else ():
                with prefixed(f"{file.parent.name}/{file.name}"):
                    read_shapes(file)
            # a copy in a cache may be intact on another host, the operator's own files are the same on each
            may_recover = not own or isinstance(error, torch.AcceleratorError | torch.OutOfMemoryError | MemoryError)
            raise StartError(f"cannot be loaded: {one_line(error)}", may_recover=may_recover) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _load(repository: Repository, device: str, dtype: torch.dtype) -> StableDiffusionPipeline:
    index = read_json(repository.path, "model_index.json")
    components: dict[str, Any] = {
        "image_encoder": None,
        "scheduler": _load_scheduler(repository.path, index["scheduler"]),
    }
    if repository.single_file:
        components |= _load_single_file(repository.single_file.path, repository.path, device, dtype)
    for component, file in repository.weights.items():
        try:
            components[component], info = simple_get_class_obj(*index[component]).from_pretrained(
                repository.path / component,
                variant="fp16" if ".fp16." in file else None,
                dtype=dtype,
                device_map=device,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        except NotImplementedError as error:
            # raised when diffusers moves a missing tensor to the device
            raise StartError(f"{file} lacks tensors of {index[component][1]}") from error
        # transformers fills in random numbers
        if missing := sorted(info["missing_keys"]):
            raise StartError(f"{file} lacks tensors of {index[component][1]}: {', '.join(missing[:3])}")
    if "safety_checker" not in components:
        components |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline.from_pretrained(repository.path, local_files_only=True, **components)


def _load_single_file(file: Path, base: Path, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Loads the components that a checkpoint holds.

    Args:
        file: the checkpoint.
        base: the directory with their configurations.
        device: ``cuda`` or ``cpu``.
        dtype: of the weights.
    """
    asked = {"config": str(base), "local_files_only": True, "dtype": dtype}
    try:
        # each tensor goes straight to the device
        unet = UNet2DConditionModel.from_single_file(str(file), subfolder="unet", device=device, **asked)
        vae = AutoencoderKL.from_single_file(str(file), subfolder="vae", device=device, **asked)
        # only a pipeline can load the text encoder
        others = dict.fromkeys(("unet", "vae", "tokenizer", "scheduler", "safety_checker", "feature_extractor"))
        pipe = StableDiffusionPipeline.from_single_file(str(file), **asked, **others)
        return {"unet": unet, "vae": vae, "text_encoder": pipe.text_encoder.to(device)}
    except NotImplementedError as error:
        # raised when a missing tensor is moved to the device
        raise StartError("it lacks tensors of its UNet, VAE or text encoder") from error


def _load_scheduler(folder: Path, pair: tuple[str, str]) -> Any:
    try:
        scheduler = simple_get_class_obj(*pair).from_pretrained(folder / "scheduler", local_files_only=True)
        if "beta_start" in scheduler.config:
            take_a_step(copy.deepcopy(scheduler))
            return scheduler
        why = "it has no betas"
    except Exception as error:
        why = one_line(error)
    raise StartError(f"scheduler/scheduler_config.json: {shortened(pair[1])} cannot run this model: {why}")


def take_a_step(scheduler: Any) -> None:
    """Takes the first of two denoising steps with nothing but zeros.

    Raises:
        Exception: if the scheduler does not support its configuration.
    """
    scheduler.set_timesteps(2)
    first, latents = scheduler.timesteps[0], torch.zeros(1, 4, 8, 8)
    scheduler.step(scheduler.scale_model_input(latents, first), first, latents)


def describe(pipe: StableDiffusionPipeline) -> str:
    """Describes where a pipeline is, and its precision."""
    device = torch.cuda.get_device_name() if pipe.device.type == "cuda" else "the CPU"
    checker = "on" if pipe.safety_checker else "off"
    return f"on {device} in {str(pipe.dtype).removeprefix('torch.')}, safety checker {checker}"


def memory_in_use() -> str:
    """Describes how much GPU memory is in use, by this process and all others."""
    if not torch.cuda.is_available():
        return "no GPU"
    free, total = torch.cuda.mem_get_info()
    return f"{(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB of GPU memory in use"
