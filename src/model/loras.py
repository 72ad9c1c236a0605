"""LoRAs: checked by their headers, and merged into a loaded pipeline."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.errors import StartError, condensed
from src.model.single_file import Shapes, context_width, kind_of, read_shapes, version

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

OTHER_KINDS = {
    "hada_": "a LoHa",
    "lokr_": "a LoKr",
    ".lora_mid.": "a LoCon with Tucker decomposition",
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    ".oft_": "an OFT",
    ".on_input": "an IA3",
    ".a1.weight": "a GLoRA",
    ".w_norm": "a LoRA with norms",
    "lora_unet_double_blocks": "a LoRA for Flux",
    "transformer.single_transformer_blocks": "a LoRA for Flux",
    "transformer.transformer_blocks": "a LoRA for Stable Diffusion 3 or Flux",
    "lora_te2_": "a LoRA for Stable Diffusion XL",
    "text_encoder_2.": "a LoRA for Stable Diffusion XL",
}
"""What diffusers cannot merge, or only in part, by what a tensor's name contains."""

WHY_UNREAD = {
    "size mismatch": "it does not fit this model: its tensors have other shapes",
    "ignore_mismatched_sizes": "it does not fit this model: its tensors have other shapes",
    "can require gradients": "its tensors are integers",
    "lora_up.weight'": "it lacks lora_up tensors",
    "`r` should be": "its rank is 0",
    "Invalid LoRA checkpoint": "it holds tensors that belong to no LoRA, such as an embedding's",
}
"""What errors of diffusers, transformers and peft mean, by what they contain."""


@dataclass(frozen=True)
class Lora:
    """A LoRA that the operator chose."""

    source: str
    """As the setting has it."""
    scale: float
    path: Path

    def __str__(self) -> str:
        name = self.path.name.removesuffix(".safetensors")
        if name == "pytorch_lora_weights":
            # diffusers' own name for any
            name = Path(self.source).parent.name
        return name if self.scale == 1 else f"{name}:{self.scale:g}"


def check(shapes: Shapes, unet: Mapping[str, Any]) -> None:
    """Checks that a file is a LoRA which diffusers can merge, for a model like this.

    Args:
        shapes: the file's tensors.
        unet: the configuration of the model's UNet.

    Raises:
        StartError: saying what it is instead.
    """
    for fragment, kind in OTHER_KINDS.items():
        if any(fragment in name for name in shapes):
            raise StartError(
                f"{kind}, which cannot be merged into this model: use a plain LoRA for Stable Diffusion 1.x or 2.x"
            )
    if not any("lora" in name for name in shapes):
        raise StartError(f"no LoRA, but {kind_of(shapes) or 'a checkpoint: set MODEL_ID to it'}")
    context, expected = context_width(shapes), unet.get("cross_attention_dim", 1280)
    if context not in (None, expected):
        raise StartError(f"a LoRA for {version(context)}, the model is {version(expected)}")


def merge(pipe: "StableDiffusionPipeline", lora: Lora) -> str:
    """Adds a LoRA to the weights of a pipeline, on its device and in its dtype.

    Returns:
        A line for the log.

    Raises:
        StartError: if it has no effect, or diffusers cannot read it.
    """
    from runpod import RunPodLogger

    try:
        with _quiet():
            pipe.load_lora_weights(str(lora.path), local_files_only=True, unet_config=pipe.unet.config)
            placed = sum("lora_" in name for part in (pipe.unet, pipe.text_encoder) for name in part.state_dict())
            pipe.fuse_lora(lora_scale=lora.scale)
            pipe.unload_lora_weights()
    except Exception as error:
        RunPodLogger().error(condensed(f"{lora}: {error}", 1000))
        quoted = condensed(f"{type(error).__name__}: {error}")
        unread = f"it does not fit this model, or diffusers cannot read it: {quoted}"
        why = next((meaning for part, meaning in WHY_UNREAD.items() if part in str(error)), unread)
        raise StartError(f"LORA={lora.source}: {why}") from error
    if not placed:
        raise StartError(f"LORA={lora.source}: no part of it fits this model")
    # the others are a number each, alpha
    given = sum(len(shape) > 1 for shape in read_shapes(lora.path).values())
    return f"LoRA {lora}: {placed} of {given} tensors merged"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what the libraries say about each layer that is not in a LoRA, or does not fit."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)
