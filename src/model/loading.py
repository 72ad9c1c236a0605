"""How the model reaches the device."""

import logging
import time
from dataclasses import dataclass
from typing import Any

import diffusers
import huggingface_hub
import torch
import transformers
from diffusers import StableDiffusionPipeline
from runpod import RunPodLogger

from src.errors import StartError
from src.generation.attention import enable_attention_slicing
from src.generation.cuda_graphs import Capture, GraphedStep
from src.model import cuda_driver, repository
from src.settings import DEFAULT_MODEL_ID, DEMO_MODEL_ID, Settings, on_runpod

log = RunPodLogger()


@dataclass(frozen=True)
class Model:
    """A loaded Stable Diffusion pipeline, ready on its device, and the name that clients know it by."""

    name: str
    pipe: StableDiffusionPipeline
    graphs: GraphedStep | None = None
    """The UNet's CUDA graphs, where they are used."""

    @property
    def native_size(self) -> int:
        """Width and height in pixels that the model was trained for."""
        size: int = self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        return size


def load(settings: Settings, dtype: torch.dtype | None = None) -> Model:
    """Finds the model and loads it onto the CUDA device, or the CPU where there is none.

    Args:
        settings: Which model, and how.
        dtype: Of the weights. By default float16 on a CUDA device, float32 on the CPU.

    Raises:
        StartError: if there is no such model, it is damaged or not one that this worker runs; or, on RunPod, if
            there is no CUDA device.
    """
    quieten_libraries()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and on_runpod() and settings.model_id != DEMO_MODEL_ID:
        why = cuda_driver.why_no_device(cuda_driver.find(), torch.version.cuda)
        raise StartError(
            f"no CUDA device: {why}. To run the embedded toy model on the CPU, set MODEL_ID={DEMO_MODEL_ID}"
        )
    model_id = settings.model_id or (DEFAULT_MODEL_ID if device == "cuda" else DEMO_MODEL_ID)

    started = time.monotonic()
    found = repository.find(model_id, settings)
    found_at = time.monotonic()
    log.info(f"model: {found}, {found.where}, {found_at - started:.1f} s")

    dtype = dtype or (torch.float16 if device == "cuda" else torch.float32)
    without: dict[str, Any] = {}
    if not settings.safety_checker:
        without = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    try:
        pipe = StableDiffusionPipeline.from_pretrained(
            found.path, dtype=dtype, device_map=device, use_safetensors=True, local_files_only=True, **without
        )
    except Exception as error:
        raise StartError(f"cannot load model {model_id}: {repository.first_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    # image by image: decoding a batch at once would need more memory than denoising it
    pipe.vae.enable_slicing()
    if settings.attention_slicing != "off":
        enable_attention_slicing(pipe, settings.attention_slicing)
    graphs = None
    if settings.acceleration == "graphs" and pipe.device.type == "cuda":
        graphs = enable_cuda_graphs(pipe, sliced=settings.attention_slicing != "off")
    log.info(
        f"weights: on {torch.cuda.get_device_name() if pipe.device.type == 'cuda' else 'the CPU'} "
        f"in {str(dtype).removeprefix('torch.')}, attention slicing {settings.attention_slicing}, "
        f"CUDA graphs {'on' if graphs else 'off'}, "
        f"safety checker {'on' if pipe.safety_checker else 'off'}, {time.monotonic() - found_at:.1f} s"
    )
    return Model(found.name, pipe, graphs)


def quieten_libraries() -> None:
    """Keeps the log to the worker's own lines and the libraries' errors."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity(logging.ERROR)
    # importing the SDK turns on every library's INFO lines: several for each file of a download
    logging.getLogger().setLevel(logging.WARNING)


def enable_cuda_graphs(pipe: StableDiffusionPipeline, *, sliced: bool) -> GraphedStep:
    """Puts the weights into channels_last, which suits tensor cores, and runs the UNet as CUDA graphs."""
    for model in (pipe.unet, pipe.vae):
        model.to(memory_format=torch.channels_last)
    if not sliced:
        # attention slicing needs the projections one by one
        pipe.fuse_qkv_projections()
    graphs = GraphedStep(pipe.unet.forward, Capture())
    pipe.unet.forward = graphs
    return graphs


def memory_in_use() -> str:
    """The GPU memory that is taken, by this process and any other, in words."""
    if not torch.cuda.is_available():
        return "no GPU"
    free, total = torch.cuda.mem_get_info()
    return f"{(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB of GPU memory in use"
