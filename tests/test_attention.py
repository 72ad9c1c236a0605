"""Slices by fused attention against diffusers' own slices."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, SlicedAttnProcessor

from src.generation.attention import FusedSlicedAttnProcessor, enable_attention_slicing
from src.model.loading import Model

IMAGES, TOKENS, CHANNELS = 3, 16, 24


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("slice_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    ("options", "inputs"),
    [
        ({}, {}),
        ({"cross_attention_dim": 10}, {"encoder_hidden_states": random(IMAGES, 7, 10)}),
        ({"bias": True, "scale_qk": False}, {}),
        (
            {"cross_attention_dim": 10, "cross_attention_norm": "layer_norm"},
            {"encoder_hidden_states": random(IMAGES, 7, 10)},
        ),
        ({"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 2.0}, {}),
        ({}, {"attention_mask": -10_000.0 * (random(IMAGES, 1, TOKENS) > 0)}),
        (
            {"cross_attention_dim": 10},
            {
                "encoder_hidden_states": random(IMAGES, 7, 10),
                "attention_mask": -10_000.0 * (random(IMAGES, 1, 7) > 0),
            },
        ),
    ],
    ids=["self", "cross", "unscaled", "cross norm", "residual", "mask", "cross mask"],
)
@torch.no_grad()
def test_the_slices_are_those_of_diffusers(slice_size: int, options: dict, inputs: dict):
    torch.manual_seed(0)
    attention = Attention(CHANNELS, heads=4, dim_head=6, **options)
    results = []
    for processor in (SlicedAttnProcessor(slice_size), FusedSlicedAttnProcessor(slice_size)):
        attention.set_processor(processor)
        results.append(attention(random(IMAGES, TOKENS, CHANNELS), **inputs))
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)


@torch.no_grad()
def test_pictures_as_input():
    attention = Attention(CHANNELS, heads=4, dim_head=6, norm_num_groups=4, residual_connection=True)
    results = []
    for processor in (SlicedAttnProcessor(2), FusedSlicedAttnProcessor(2)):
        attention.set_processor(processor)
        results.append(attention(random(IMAGES, CHANNELS, 4, 5)))
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)


@pytest.mark.parametrize("setting", ["auto", "max"])
@pytest.mark.parametrize("model", ["v1_4_model", "demo_model"])
@torch.no_grad()
def test_every_attention_of_a_model_is_sliced(model: str, setting: str, request: pytest.FixtureRequest):
    loaded: Model = request.getfixturevalue(model)
    unet = loaded.pipe.unet
    inputs = random(3, unet.config.in_channels, 8, 8), torch.tensor(500)
    text = random(3, 77, unet.config.cross_attention_dim)
    results = []
    try:
        for enable in (loaded.pipe.enable_attention_slicing, lambda size: enable_attention_slicing(loaded.pipe, size)):
            enable(setting)
            results.append(unet(*inputs, encoder_hidden_states=text).sample)
        assert {type(processor) for processor in unet.attn_processors.values()} == {FusedSlicedAttnProcessor}
    finally:
        enable_attention_slicing(loaded.pipe, "auto")
    torch.testing.assert_close(*results, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_single_head_is_a_slice():
    attention = Attention(CHANNELS, heads=1, dim_head=6)
    pipe = type("OneHead", (), {})()
    pipe.unet = torch.nn.ModuleList([attention])
    # what diffusers makes of half of one head
    pipe.enable_attention_slicing = lambda _: attention.set_processor(SlicedAttnProcessor(0))
    enable_attention_slicing(pipe, "auto")
    assert attention(random(IMAGES, TOKENS, CHANNELS)).shape == (IMAGES, TOKENS, CHANNELS)
