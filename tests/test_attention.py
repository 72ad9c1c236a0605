"""Sliced fused attention compared with diffusers' plain attention."""

import copy
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

from src.generation.attention import FusedSlicedAttnProcessor, enable_attention_slicing
from tests.support.v1_4 import SMALL

IMAGES, TOKENS, CHANNELS, HEADS = 3, 16, 24, 4


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def random_mask(*shape: int) -> torch.Tensor:
    return -10_000.0 * (random(*shape) > 0)


CROSS = {"cross_attention_dim": 10}
CONTEXT = {"encoder_hidden_states": random(IMAGES, 7, 10)}
CASES: dict[str, tuple[dict, dict]] = {
    "self": ({}, {}),
    "cross": (CROSS, CONTEXT),
    "unscaled": ({"bias": True, "scale_qk": False}, {}),
    "cross norm": (CROSS | {"cross_attention_norm": "layer_norm"}, CONTEXT),
    "residual": ({"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 2.0}, {}),
    "pictures": (
        {"norm_num_groups": 4, "residual_connection": True},
        {"hidden_states": random(IMAGES, CHANNELS, 4, 5)},
    ),
    "mask": ({}, {"attention_mask": random_mask(IMAGES, 1, TOKENS)}),
    "mask of heads": ({}, {"attention_mask": random_mask(IMAGES * HEADS, 1, TOKENS)}),
    "cross mask": (CROSS, CONTEXT | {"attention_mask": random_mask(IMAGES, 1, 7)}),
}
"""Options and inputs of the attention module."""


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused projections"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("options", "inputs"), CASES.values(), ids=CASES)
@torch.no_grad()
def test_sliced_attention_equals_plain_attention(options: dict, inputs: dict, steps: int, fused: bool):
    torch.manual_seed(0)
    attention = Attention(CHANNELS, heads=HEADS, dim_head=6, processor=AttnProcessor(), **options)
    inputs = {"hidden_states": random(IMAGES, TOKENS, CHANNELS)} | inputs
    plain = attention(**inputs)
    if fused:
        attention.fuse_projections()
        # a fused module must not use them
        del attention.to_k, attention.to_v
    attention.set_processor(FusedSlicedAttnProcessor(steps))
    torch.testing.assert_close(attention(**inputs), plain, atol=1e-5, rtol=0)


def pipe_of(unet: torch.nn.Module) -> StableDiffusionPipeline:
    """A pipeline that consists of a UNet only."""
    return StableDiffusionPipeline(None, None, None, unet, None, None, None, requires_safety_checker=False)


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused projections"])
@pytest.mark.parametrize("setting", ["off", "auto", "max"])
@pytest.mark.parametrize("model", ["v1_4_pipe", "demo_pipe"])
@torch.no_grad()
def test_slicing_covers_every_attention_layer_of_a_model(
    model: str, setting: str, fused: bool, request: pytest.FixtureRequest
):
    unet = copy.deepcopy(request.getfixturevalue(model).unet)
    inputs = random(3, unet.config.in_channels, 8, 8), torch.tensor(500), random(3, 77, unet.config.cross_attention_dim)
    unet.set_attn_processor(AttnProcessor())
    plain = unet(*inputs).sample
    unet.set_attn_processor(AttnProcessor2_0())
    if fused:
        unet.fuse_qkv_projections()
    enable_attention_slicing(pipe_of(unet), setting)
    assert {type(processor) for processor in unet.attn_processors.values()} == {FusedSlicedAttnProcessor}
    torch.testing.assert_close(unet(*inputs).sample, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("setting", "heads", "slices"),
    [("off", 8, [8]), ("auto", 8, [4, 4]), ("auto", 5, [3, 2]), ("auto", 1, [1]), ("max", 8, [1] * 8)],
)
def test_off_computes_one_slice_auto_two_and_max_one_per_head(
    setting: str, heads: int, slices: list[int], monkeypatch: pytest.MonkeyPatch
):
    computed: list[int] = []
    fused_attention = torch.nn.functional.scaled_dot_product_attention

    def record(query: torch.Tensor, *others: torch.Tensor, **options: Any) -> torch.Tensor:
        computed.append(query.shape[1])
        return fused_attention(query, *others, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    unet = UNet2DConditionModel(
        **SMALL["unet"] | {"block_out_channels": (40, 40)}, norm_num_groups=8, attention_head_dim=heads
    )
    enable_attention_slicing(pipe_of(unet), setting)
    unet(random(1, 4, 8, 8), 500, random(1, 77, 32))
    assert computed == slices * len(unet.attn_processors)
