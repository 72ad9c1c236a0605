"""A repository like Stable Diffusion v1-4 of 2022: same layout, components and age, but random weights."""

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel

Sizes = dict[str, dict[str, Any]]

SMALL: Sizes = {
    "text_encoder": {
        "vocab_size": 514,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "unet": {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
    },
    "vae": {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "sample_size": 64},
    "vision": {
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "patch_size": 32,
    },
    "safety_checker": {"projection_dim": 32},
}
"""A few hundred thousand parameters, for pictures of 64 x 64."""

FULL: Sizes = {
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "unet": {"sample_size": 64, "cross_attention_dim": 768},
    "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512},
    "vision": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
    "safety_checker": {"projection_dim": 768},
}
"""The model's own configuration: 1.37 billion parameters."""


SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.7.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
"""The model's own configuration, from before ``prediction_type`` and ``timestep_spacing`` existed."""


def vocabulary(size: int) -> tuple[list[str], list[str]]:
    """Returns the ``size`` words of a byte-level tokenizer, and the merges that make the longer ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [*alphabet, *(byte + "</w>" for byte in alphabet)]
    pairs = list(itertools.islice(itertools.product(alphabet, letters), size - len(letters) - 2))
    words = [*letters, *(first + second for first, second in pairs), "<|startoftext|>", "<|endoftext|>"]
    return words, [f"{first} {second}" for first, second in pairs]


def make_repository(folder: Path, sizes: Sizes = SMALL) -> Path:
    """Writes the repository into ``folder`` (made where missing) and returns it."""
    torch.manual_seed(0)
    words, merges = vocabulary(sizes["text_encoder"]["vocab_size"])
    text_config = sizes["text_encoder"] | {
        "max_position_embeddings": 77,
        "bos_token_id": len(words) - 2,
        "eos_token_id": len(words) - 1,
        "pad_token_id": 1,
    }
    safety_checker = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config=sizes["vision"] | {"image_size": 224}, **sizes["safety_checker"])
    )
    # no picture reaches these thresholds: a cosine is at most 1
    safety_checker.concept_embeds_weights.data.fill_(2.0)
    safety_checker.special_care_embeds_weights.data.fill_(2.0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        **sizes["vae"],
    )
    models = {
        "text_encoder": (CLIPTextModel(CLIPTextConfig(**text_config)), "pytorch_model.bin"),
        "unet": (UNet2DConditionModel(**{"attention_head_dim": 8} | sizes["unet"]), "diffusion_pytorch_model.bin"),
        "vae": (vae, "diffusion_pytorch_model.bin"),
        "safety_checker": (safety_checker, "pytorch_model.bin"),
    }
    for name, (model, pickled) in models.items():
        model.save_pretrained(folder / name, safe_serialization=True)
        if sizes is SMALL:
            torch.save(model.state_dict(), folder / name / pickled)

    def write(path: str, content: object) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(content, ensure_ascii=False))

    write("scheduler/scheduler_config.json", SCHEDULER)
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    write("tokenizer/vocab.json", {word: i for i, word in enumerate(words)})
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    write("tokenizer/special_tokens_map.json", special | {"unk_token": "<|endoftext|>"})
    write(
        "tokenizer/tokenizer_config.json",
        special | {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77},
    )
    write(
        "feature_extractor/preprocessor_config.json",
        {
            "crop_size": 224,
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3,
            "size": 224,
        },
    )
    write(
        "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.2.2",
            "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
            "scheduler": ["diffusers", "PNDMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )
    return folder
