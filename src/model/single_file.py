"""Tells what a weight file is from its header, before anything large is read."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from src.errors import StartError

Shapes = Mapping[str, Sequence[int]]
"""The shape of each tensor in a file, by its name."""

PICKLED = "pickled weights can run code, and are not read: use the model's .safetensors file"

WEB_PAGE = "a site's answer, not the weights: download them again, with an API key if the site wants one"

NOT_SAFETENSORS = {
    b"version https://git-lfs": "a Git LFS pointer, not the weights: fetch them with git lfs pull",
    b"<!": WEB_PAGE,
    b"<html": WEB_PAGE,
    b'{"': WEB_PAGE,
    b"PK\x03\x04": PICKLED,
    b"\x80\x02\x8a": PICKLED,
    b"GGUF": "a GGUF file, which is not read: use the model's .safetensors file",
}
"""What else people have under such names, by the first bytes."""

UNET, VAE = "model.diffusion_model.", "first_stage_model."
"""How the names of a checkpoint's tensors begin."""

COMPONENT = "of a diffusers directory: MODEL_ID must be the directory, or a checkpoint with all parts in one file"
RUNS = "this worker runs Stable Diffusion 1.x and 2.x"

KINDS = {
    (
        "lora_",
        ".lora.",
        "hada_",
        "lokr_",
    ): "a LoRA: set LORA to it, and MODEL_ID to the model that it is for",
    ("noise_augmentor.",): f"an unCLIP checkpoint, {RUNS}",
    ("conditioner.embedders.", "label_emb."): f"a Stable Diffusion XL checkpoint, {RUNS}",
    ("joint_blocks.",): f"a Stable Diffusion 3 checkpoint, {RUNS}",
    ("double_blocks.", "single_transformer_blocks."): f"a Flux checkpoint, {RUNS}",
    ("control_model.", "controlnet_", "input_hint_block."): f"a ControlNet, which is not used here: {RUNS}",
    (f"{UNET}input_blocks.0.0.weight",): "",
    (UNET, VAE): f"a checkpoint that lacks tensors of its UNet, or of another kind: {RUNS}",
    ("emb_params", "string_to_param", "clip_l"): (
        "a textual inversion: add it to a directory with diffusers (load_textual_inversion, then save_pretrained)"
    ),
    ("encoder.conv_in.", "decoder.conv_in."): f"a VAE, or that {COMPONENT}",
    ("down_blocks.",): f"the UNet {COMPONENT}",
    ("vision_model.",): f"the safety checker {COMPONENT}",
    ("embeddings.token_embedding.",): f"the text encoder {COMPONENT}",
}
"""What a file is whose tensors' names contain one of these, nothing for a checkpoint. The first that fits counts."""

TEXT_ENCODERS = (
    "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
    "cond_stage_model.model.token_embedding.weight",
)
"""By which diffusers knows a text encoder of 1.x and of 2.x."""


def read_shapes(file: Path) -> Shapes:
    """Reads the header of a safetensors file.

    Raises:
        StartError: saying what the file is instead, without its name.
    """
    if not os.access(file, os.R_OK):
        raise StartError("it may not be read by this user")
    try:
        with safe_open(file, "np") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        with file.open("rb") as opened:
            begin = opened.read(32)
        for first, what in NOT_SAFETENSORS.items():
            if begin.startswith(first):
                raise StartError(what) from error
        size = f"{file.stat().st_size:,} bytes"
        raise StartError(f"cut off at {size}, or no safetensors file: download it again ({error})") from error
    if file.suffix != ".safetensors":
        raise StartError("its name must end with .safetensors")
    return shapes


def kind_of(shapes: Shapes) -> str:
    """Says what a file is, and what would work; an empty string for a checkpoint of Stable Diffusion 1.x or 2.x."""
    for fragments, kind in KINDS.items():
        if any(fragment in name for name in shapes for fragment in fragments):
            return kind
    return f"no checkpoint of a kind that is known here, {RUNS}"


def check_checkpoint(shapes: Shapes) -> None:
    """Checks that a file is a checkpoint of Stable Diffusion 1.x or 2.x with all parts.

    Raises:
        StartError: saying what it is instead, and what would work.
    """
    if kind := kind_of(shapes):
        raise StartError(kind)
    parts = {"a VAE": (VAE,), "a text encoder that diffusers can read": TEXT_ENCODERS}
    missing = [part for part, names in parts.items() if not any(name.startswith(names) for name in shapes)]
    if missing:
        raise StartError(f"a checkpoint without {' and '.join(missing)}: use one with all parts")


def check_version(shapes: Shapes) -> None:
    """Checks that v1-4 may lend a checkpoint everything else.

    Raises:
        StartError: if the checkpoint is one of Stable Diffusion 2.x.
    """
    if context_width(shapes) == 1024:
        raise StartError(f"a checkpoint of {version(1024)}: set BASE_MODEL to a directory or hub id of that version")


def check_fits(shapes: Shapes, unet: Mapping[str, Any]) -> None:
    """Checks that a checkpoint's UNet is one of the model that lends it everything else.

    Args:
        shapes: the checkpoint's tensors.
        unet: the configuration of that model's UNet.

    Raises:
        StartError: if not.
    """
    channels, expected = shapes[f"{UNET}input_blocks.0.0.weight"][1], unet.get("in_channels", 4)
    if channels != expected:
        what = "a checkpoint for inpainting" if channels == 9 else "a checkpoint of another kind"
        line = f"{what}: its UNet has {channels} input channels, that of BASE_MODEL {expected}"
        raise StartError(f"{line}: set BASE_MODEL to a directory or hub id of the same kind")
    context, expected = context_width(shapes), unet.get("cross_attention_dim", 1280)
    if context not in (None, expected):
        raise StartError(
            f"a checkpoint of {version(context)}, BASE_MODEL is {version(expected)}: set BASE_MODEL to a directory or "
            "hub id of the same version"
        )


def version(context: int | None) -> str:
    """The version of Stable Diffusion whose UNet attends to so many channels."""
    known = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
    return known.get(context or 0, f"another model (a context of {context} channels)")


def context_width(shapes: Shapes) -> int | None:
    """Returns the channels of the context that a UNet attends to, or a LoRA for one."""
    ends = (
        "attn2.to_k.weight",
        "attn2_to_k.lora_down.weight",
        "attn2.to_k.lora_A.weight",
        "attn2.to_k.lora.down.weight",
        "to_k_lora.down.weight",
    )
    found = (shape for name, shape in shapes.items() if name.endswith(ends) and "attn2" in name and len(shape) > 1)
    return next((shape[1] for shape in found), None)
