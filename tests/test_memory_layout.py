"""Models in the fastest layout compute what those of diffusers do, and convert no activation."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ModelMixin, StableDiffusionPipeline, UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode

from src.generation.memory_layout import use_fastest_layout
from tests.support.layouts import SMALL_V2
from tests.support.v1_4 import SMALL


class Norm(ModelMixin):
    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = torch.nn.GroupNorm(4, channels, eps)
        torch.nn.init.normal_(self.norm.weight)
        torch.nn.init.normal_(self.norm.bias)


class Calls(TorchDispatchMode):
    """Counts the operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.made = Counter[str]()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made[operation.overloadpacket.__name__] += 1
        return operation(*args, **(kwargs or {}))


@pytest.fixture(params=["v1", "v2", "embedded"])
def unet(request: pytest.FixtureRequest) -> UNet2DConditionModel:
    if request.param == "embedded":
        return copy.deepcopy(request.getfixturevalue("demo_pipe").unet)
    torch.manual_seed(0)
    sizes = {"v1": SMALL, "v2": SMALL_V2}[request.param]
    return UNet2DConditionModel(**{"attention_head_dim": 8} | sizes["unet"]).eval()


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mean", [0, 100])
@pytest.mark.parametrize("scale", [1e-3, 1, 1000])
@pytest.mark.parametrize("shape", [(1, 4, 1, 3), (2, 8, 5, 7), (3, 40, 8, 8)])
@torch.no_grad()
def test_group_norm_equals_pytorchs(shape: tuple[int, ...], scale: float, mean: float):
    torch.manual_seed(0)
    model = Norm(shape[1], eps=1e-6)
    pixels = (mean + torch.randn(shape)) * scale
    expected = model.norm(pixels)
    use_fastest_layout(model)
    got = model.norm(pixels.contiguous(memory_format=torch.channels_last))
    assert got.is_contiguous(memory_format=torch.channels_last)
    close(got, expected)
    # other layouts and shapes, such as the tokens of the VAE's attention, are left to PyTorch
    assert torch.equal(model.norm(pixels), expected)
    assert torch.equal(model.norm(pixels.flatten(2)), expected.flatten(2))


@torch.no_grad()
def test_group_norm_of_large_float16_does_not_overflow():
    model = Norm(8).half()
    # their variance is beyond float16
    pixels = (1000 * torch.randn(1, 8, 16, 16)).half()
    expected = model.float().norm(pixels.float())
    use_fastest_layout(model.half())
    got = model.norm(pixels.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(got.float(), expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused projections"])
@torch.no_grad()
def test_unet_predicts_the_same_and_converts_nothing(unet: UNet2DConditionModel, fused: bool):
    latents = torch.randn(2, unet.config.in_channels, 8, 8)
    inputs = latents, torch.tensor(500), torch.randn(2, 77, unet.config.cross_attention_dim)
    expected = unet(*inputs).sample
    if fused:
        unet.fuse_qkv_projections()
    use_fastest_layout(unet)
    with Calls() as calls:
        got = unet(*inputs).sample
    close(got, expected)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert not calls.made.keys() & {"clone", "contiguous", "native_group_norm"}


@torch.no_grad()
def test_vae_encodes_and_decodes_the_same(v1_4_pipe: StableDiffusionPipeline):
    vae: AutoencoderKL = copy.deepcopy(v1_4_pipe.vae)
    pixels, latents = torch.randn(1, 3, 64, 64), torch.randn(1, 4, 8, 8)
    encoded, decoded = vae.encode(pixels).latent_dist.mean, vae.decode(latents).sample
    use_fastest_layout(vae)
    close(vae.encode(pixels).latent_dist.mean, encoded)
    close(vae.decode(latents).sample, decoded)
    assert vae.decode(latents).sample.is_contiguous(memory_format=torch.channels_last)
