"""Single files as Civitai and the hub hand them out, made from directories: checkpoints and LoRAs."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from tests.support.layouts import weight_file

Tensors = dict[str, torch.Tensor]

RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
UNET = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}
VAE = {
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
    ".resnets.": ".block.",
    "downsamplers.0.": "downsample.",
    "upsamplers.0.": "upsample.",
    "down_blocks.": "down.",
    "conv_norm_out.": "norm_out.",
    "conv_shortcut.": "nin_shortcut.",
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
}
OPEN_CLIP = {
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.": "attn.",
    "final_layer_norm.": "ln_final.",
    "embeddings.token_embedding.": "token_embedding.",
    "embeddings.position_embedding.weight": "positional_embedding",
}


def renamed(name: str, names: Mapping[str, str]) -> str:
    for new, old in names.items():
        name = name.replace(new, old)
    return name


def unet_name(name: str, layers: int, others: Collection[str]) -> str:
    """The name of 2022 of a tensor of the UNet, which has ``layers`` in each block, and ``others``."""
    if found := re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name):
        side, block, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            number = 1 + (f"up_blocks.{block}.attentions.0.norm.weight" in others)
            return f"output_blocks.{block * (layers + 1) + layers}.{number}.{rest}"
        start = {"down": "input_blocks", "up": "output_blocks"}[side]
        number = block * (layers + 1) + layer + (side == "down")
        return f"{start}.{number}.0.{renamed(rest, RESNET)}" if kind == "resnets" else f"{start}.{number}.1.{rest}"
    return renamed(name, RESNET | UNET if "resnets" in name else UNET)


def old_vae(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    if "attentions" in name and tensor.ndim == 2:
        tensor = tensor[:, :, None, None]
    name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{3 - int(found[1])}", name)
    return renamed(name, VAE), tensor


def open_clip(tensors: Tensors) -> Tensors:
    """Queries, keys and values of a layer are one tensor."""
    result, attention = {}, re.compile(r"(.*self_attn\.)([qkv])_proj\.(weight|bias)")
    for name, tensor in tensors.items():
        if found := attention.fullmatch(name):
            three = [tensors[f"{found[1]}{each}_proj.{found[3]}"] for each in "qkv"]
            result[f"{renamed(found[1], OPEN_CLIP)}in_proj_{found[3]}"] = torch.cat(three)
        else:
            result[renamed(name, OPEN_CLIP)] = tensor
    return result


def make_checkpoint(folder: Path, file: Path, dtype: torch.dtype = torch.float32, *, ema: bool = False) -> Path:
    """Writes a directory's weights into one file, under the names of 2022, and returns it.

    Args:
        folder: the directory; of 2.x if its UNet has linear projections.
        file: to write.
        dtype: of the weights.
        ema: adds a second UNet for training.
    """
    parts = {part: load_file(weight_file(folder, part)) for part in ("unet", "vae", "text_encoder")}
    layers = json.loads((folder / "unet" / "config.json").read_text())["layers_per_block"]
    unet = {unet_name(name, layers, parts["unet"]): tensor for name, tensor in parts["unet"].items()}
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in unet.items()}
    if ema:
        tensors |= {f"model_ema.diffusion_model{name.replace('.', '')}": t * 2 for name, t in unet.items()}
    vae = dict(old_vae(name, tensor) for name, tensor in parts["vae"].items())
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in vae.items()}
    text = {name.removeprefix("text_model."): tensor for name, tensor in parts["text_encoder"].items()}
    if parts["unet"]["mid_block.attentions.0.proj_in.weight"].ndim == 2:
        tensors |= {f"cond_stage_model.model.{name}": tensor for name, tensor in open_clip(text).items()}
    else:
        tensors |= {f"cond_stage_model.transformer.text_model.{name}": tensor for name, tensor in text.items()}
    tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    # as training frameworks leave them
    tensors |= {"alphas_cumprod": torch.zeros(1000), "model_ema.decay": torch.zeros(())} if ema else {}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file


Layer = tuple[str, torch.nn.Module]


def layers_of(pipe: StableDiffusionPipeline, wanted: Callable[[Layer], bool]) -> tuple[list[Layer], list[Layer]]:
    """Linear layers and convolutions of the UNet and of the text encoder."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    unet, text_encoder = (
        [layer for layer in part.named_modules() if isinstance(layer[1], kinds) and wanted(layer)]
        for part in (pipe.unet, pipe.text_encoder)
    )
    return unet, text_encoder


def trained(layer: Layer) -> bool:
    """What kohya's scripts train: attention, its feed-forward layers and projections, and all of the text encoder."""
    return "attentions" in layer[0] or "encoder.layers" in layer[0]


def factors(module: torch.nn.Module, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random matrices down and up."""
    out, inside, *kernel = module.weight.shape
    return torch.randn(rank, inside, *kernel) / 10, torch.randn(out, rank, *(1 for _ in kernel)) / 10


def kohya(unet: Iterable[Layer], text_encoder: Iterable[Layer], rank: int = 4, alpha: float = 2.0) -> Tensors:
    """A LoRA as kohya's scripts save it, which Civitai has."""
    torch.manual_seed(1)
    tensors: Tensors = {}
    for prefix, layers in (("lora_unet_", unet), ("lora_te_text_model_", text_encoder)):
        for name, module in layers:
            key = prefix + name.replace(".", "_")
            down, up = factors(module, rank)
            tensors |= {
                f"{key}.lora_down.weight": down,
                f"{key}.lora_up.weight": up,
                f"{key}.alpha": torch.tensor(alpha),
            }
    return tensors


def expected_change(tensors: Tensors, layer: str, scale: float) -> torch.Tensor:
    """What merging kohya's LoRA adds to a layer: scale x alpha / rank x up x down."""
    key = f"lora_te_text_model_{layer}" if layer.startswith("encoder.layers") else f"lora_unet_{layer}"
    key = key.replace(".", "_")
    up, down = tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"]
    change = (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])
    return scale * tensors[f"{key}.alpha"] / len(down) * change


def kohya_of_2022(unet: Iterable[Layer], text_encoder: Iterable[Layer]) -> Tensors:
    """The same with the names of 2022, as some scripts for the UNet's attention have them."""
    unet, tensors = list(unet), {}
    old = {name.replace(".", "_"): unet_name(name, 2, ()).replace(".", "_") for name, _ in unet}
    for key, tensor in kohya(unet, text_encoder).items():
        layer, _, rest = key.removeprefix("lora_unet_").partition(".")
        tensors[f"lora_unet_{old[layer]}.{rest}" if layer in old else key] = tensor
    return tensors


def peft(unet: Iterable[Layer], text_encoder: Iterable[Layer], rank: int = 4) -> Tensors:
    """A LoRA as diffusers' training scripts save it."""
    torch.manual_seed(1)
    tensors: Tensors = {}
    for prefix, layers in (("unet.", unet), ("text_encoder.text_model.", text_encoder)):
        for name, module in layers:
            down, up = factors(module, rank)
            tensors |= {f"{prefix}{name}.lora_A.weight": down, f"{prefix}{name}.lora_B.weight": up}
    return tensors
