"""Repositories in the layouts of real ones, with random weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from src.model.checks import WEIGHTS
from tests.support.v1_4 import SCHEDULER, SMALL, Sizes, make_repository


def edit(folder: Path, name: str, **changes: Any) -> None:
    """Changes keys of a JSON file. None removes a key."""
    content = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def weight_file(folder: Path, component: str) -> Path:
    return folder / component / f"{WEIGHTS[component]}.safetensors"


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Changes the tensors of a weight file."""
    save_file(change(load_file(file)), file, {"format": "pt"})


def halve(folder: Path, *components: str, keep: bool = True) -> None:
    """Saves components, by default all, in float16 under the names of the variant ``fp16``.

    Args:
        folder: the repository.
        components: their names.
        keep: whether to keep the float32 files.
    """
    for component in components or WEIGHTS:
        file = weight_file(folder, component)
        tensors = {name: tensor.half() for name, tensor in load_file(file).items()}
        save_file(tensors, file.with_suffix(".fp16.safetensors"), {"format": "pt"})
        if not keep:
            file.unlink()


def set_scheduler(folder: Path, class_name: str, **config: Any) -> None:
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": class_name} | config))
    edit(folder, "model_index.json", scheduler=["diffusers", class_name])


def v1_4_of_2022(folder: Path) -> None:
    """As CompVis/stable-diffusion-v1-4: tensors under their names of 2022, float16 next to float32, a stray file."""
    make_repository(folder)
    positions = torch.arange(77)[None]
    rewrite(
        weight_file(folder, "text_encoder"),
        lambda tensors: (
            {f"text_model.{name}": tensor for name, tensor in tensors.items()}
            | {"text_model.embeddings.position_ids": positions}
        ),
    )
    rewrite(
        weight_file(folder, "safety_checker"),
        lambda tensors: (
            {name.replace("vision_model.", "vision_model.vision_model."): t for name, t in tensors.items()}
            | {"vision_model.vision_model.embeddings.position_ids": torch.arange(50)[None]}
        ),
    )
    attention = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for new, old in attention.items():
            tensors = {name.replace(f"0.{new}.", f"0.{old}."): tensor for name, tensor in tensors.items()}
        return tensors

    rewrite(weight_file(folder, "vae"), old_names)
    halve(folder)
    (folder / "scheduler" / "scheduler_config-checkpoint.json").write_text("{}")


def v1_5(folder: Path) -> None:
    """As stable-diffusion-v1-5: with weights for training and single-file checkpoints."""
    make_repository(folder)
    edit(folder, "model_index.json", feature_extractor=["transformers", "CLIPImageProcessor"])
    weights = weight_file(folder, "unet")
    weights.with_suffix(".non_ema.safetensors").write_bytes(weights.read_bytes())
    (folder / "v1-5-pruned-emaonly.safetensors").write_bytes(b"")


SMALL_V2: Sizes = SMALL | {
    "text_encoder": SMALL["text_encoder"] | {"hidden_size": 40, "intermediate_size": 48, "hidden_act": "gelu"},
    "unet": SMALL["unet"] | {"cross_attention_dim": 40, "use_linear_projection": True, "attention_head_dim": [2, 4]},
}


def v2_1(folder: Path) -> None:
    """As stable-diffusion-2-1: v-prediction, OpenCLIP's text encoder and padding, heads per block, no checker."""
    make_repository(folder, SMALL_V2)
    set_scheduler(folder, "DDIMScheduler", **trained(SCHEDULER), prediction_type="v_prediction")
    without_checker(folder)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        edit(folder, f"tokenizer/{name}", pad_token="!")


def trained(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def turbo(folder: Path) -> None:
    """As sd-turbo: few steps, with trailing timesteps."""
    v2_1(folder)
    set_scheduler(folder, "EulerDiscreteScheduler", **trained(SCHEDULER), timestep_spacing="trailing")


def lcm(folder: Path) -> None:
    """As a latent consistency model, with the guidance as an input of the UNet."""
    make_repository(folder, SMALL | {"unet": SMALL["unet"] | {"time_cond_proj_dim": 16}})
    set_scheduler(folder, "LCMScheduler", beta_schedule="scaled_linear")


def deis(folder: Path) -> None:
    """As a DreamBooth fine-tune that was saved with another scheduler."""
    make_repository(folder)
    set_scheduler(folder, "DEISMultistepScheduler", **trained(SCHEDULER))
    edit(folder, "model_index.json", _name_or_path="CompVis/stable-diffusion-v1-4")


def ddim_of_2022(folder: Path) -> None:
    """With a configuration that the pipeline corrects."""
    make_repository(folder)
    betas = {key: SCHEDULER[key] for key in ("beta_start", "beta_end", "beta_schedule")}
    set_scheduler(folder, "DDIMScheduler", **betas)


def without_checker(folder: Path) -> None:
    """As a pipeline that was saved without the optional parts."""
    if not (folder / "model_index.json").exists():
        make_repository(folder)
    (folder / "safety_checker").rename(folder.parent / "left out")
    nothing = [None, None]
    edit(folder, "model_index.json", safety_checker=nothing, feature_extractor=nothing, image_encoder=nothing)


def textual_inversion(folder: Path) -> None:
    """With a learnt word of two tokens."""
    make_repository(folder)
    words = SMALL["text_encoder"]["vocab_size"]
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    text_encoder.resize_token_embeddings(words + 2)
    text_encoder.save_pretrained(folder / "text_encoder")
    (folder / "tokenizer" / "added_tokens.json").write_text(json.dumps({"<cat>": words, "<cat>_1": words + 1}))


def float16_only(folder: Path) -> None:
    make_repository(folder)
    halve(folder, keep=False)


def float16_in_part(folder: Path) -> None:
    """Two components in float16 only, the others in float32 only."""
    make_repository(folder)
    halve(folder, "unet", "text_encoder", keep=False)


def inpainting(folder: Path) -> None:
    """As stable-diffusion-inpainting: a UNet that also takes a mask and the latents of what it leaves."""
    make_repository(folder, SMALL | {"unet": SMALL["unet"] | {"in_channels": 9}})
    edit(folder, "model_index.json", _class_name="StableDiffusionInpaintPipeline")


LAYOUTS: dict[Callable[[Path], None], dict[str, Any]] = {
    v1_4_of_2022: {},
    v1_5: {},
    v2_1: {},
    turbo: {"num_inference_steps": 1, "guidance_scale": 0.0},
    lcm: {"num_inference_steps": 4, "guidance_scale": 8.0},
    deis: {},
    ddim_of_2022: {},
    without_checker: {},
    textual_inversion: {"prompt": "a photo of a <cat>"},
    float16_only: {},
    float16_in_part: {},
}
"""The layouts, and the request fields for a model in each."""
