"""Models in the fastest layout compute what those of diffusers do, and convert no activation."""

import copy
from collections import Counter
from typing import Any, Literal

import pytest
import torch
from diffusers import AutoencoderKL, ModelMixin, StableDiffusionPipeline, UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode

from src.generation import acceleration
from src.generation.memory_layout import FASTER, use_fastest_layout
from src.settings import Settings
from tests.support.layouts import SMALL_V2
from tests.support.v1_4 import SMALL

CONVERSIONS = {"clone", "contiguous", "native_group_norm"}


class Norm(ModelMixin):
    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = torch.nn.GroupNorm(4, channels, eps)
        torch.nn.init.normal_(self.norm.weight)
        torch.nn.init.normal_(self.norm.bias)


class Calls(TorchDispatchMode):
    """Counts the operations that are called, and those of them whose input is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.made, self.scattered = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        self.made[name] += 1
        self.scattered[name] += not args[0].is_contiguous() if args and isinstance(args[0], torch.Tensor) else 0
        return operation(*args, **(kwargs or {}))


@pytest.fixture(params=["v1", "v2", "embedded"])
def unet(request: pytest.FixtureRequest) -> UNet2DConditionModel:
    if request.param == "embedded":
        return copy.deepcopy(request.getfixturevalue("demo_pipe").unet)
    torch.manual_seed(0)
    sizes = {"v1": SMALL, "v2": SMALL_V2}[request.param]
    return UNet2DConditionModel(**{"attention_head_dim": 8} | sizes["unet"]).eval()


def in_channels_last(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
@pytest.mark.parametrize("mean", [0, 100])
@pytest.mark.parametrize("scale", [1e-3, 1, 1000])
@pytest.mark.parametrize("shape", [(1, 4, 1, 3), (2, 8, 5, 7), (3, 40, 8, 8)])
@torch.no_grad()
def test_group_norm_equals_pytorchs(shape: tuple[int, ...], scale: float, mean: float, eps: float):
    torch.manual_seed(0)
    model = Norm(shape[1], eps)
    pixels = (mean + torch.randn(shape)) * scale
    expected = model.norm(pixels)
    use_fastest_layout(model)
    got = model.norm(pixels.contiguous(memory_format=torch.channels_last))
    assert in_channels_last(got)
    close(got, expected)
    # other layouts and shapes, such as the tokens of the VAE's attention, are left to PyTorch
    assert torch.equal(model.norm(pixels), expected)
    assert torch.equal(model.norm(pixels.flatten(2)), expected.flatten(2))


@pytest.mark.parametrize(("mean", "std"), [(0, 1), (10, 1), (0, 1000), (10_000, 1000), (0, 1e-4)])
@torch.no_grad()
def test_group_norm_of_float16_is_precise_and_does_not_overflow(mean: float, std: float):
    torch.manual_seed(0)
    model = Norm(64).half()
    pixels = (mean + std * torch.randn(2, 64, 16, 16)).half()
    exact = copy.deepcopy(model).double().norm(pixels.double())
    use_fastest_layout(model)
    got = model.norm(pixels.contiguous(memory_format=torch.channels_last))
    assert got.dtype == torch.float16
    assert (got - exact).norm() < 3e-3 * exact.norm()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@torch.no_grad()
def test_group_norm_hides_no_nan(value: float):
    model, pixels = Norm(8), torch.randn(1, 8, 4, 4)
    pixels[0, 0, 0, 0] = value
    use_fastest_layout(model)
    assert model.norm(pixels.contiguous(memory_format=torch.channels_last)).isnan().any()


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused projections"])
@pytest.mark.parametrize("size", [(8, 8), (6, 12)])
@torch.no_grad()
def test_unet_predicts_the_same_and_converts_nothing(unet: UNet2DConditionModel, size: tuple[int, int], fused: bool):
    latents = torch.randn(2, unet.config.in_channels, *size)
    inputs = latents, torch.tensor(500), torch.randn(2, 77, unet.config.cross_attention_dim)
    expected = unet(*inputs).sample
    if fused:
        unet.fuse_qkv_projections()
    use_fastest_layout(unet)
    with Calls() as calls:
        got = unet(*inputs).sample
    close(got, expected)
    assert in_channels_last(got)
    assert not calls.made.keys() & CONVERSIONS
    assert calls.made["gelu"]
    assert not calls.scattered["gelu"]


@torch.no_grad()
def test_vae_encodes_and_decodes_the_same(v1_4_pipe: StableDiffusionPipeline):
    vae: AutoencoderKL = copy.deepcopy(v1_4_pipe.vae)
    pixels, latents = torch.randn(1, 3, 64, 96), torch.randn(1, 4, 8, 12)
    encoded, decoded = vae.encode(pixels).latent_dist.mean, vae.decode(latents).sample
    use_fastest_layout(vae)
    close(vae.encode(pixels).latent_dist.mean, encoded)
    with Calls() as calls:
        got = vae.decode(latents).sample
    close(got, decoded)
    assert in_channels_last(got)
    # that of the attention's tokens
    assert calls.made["native_group_norm"] == 1


@pytest.mark.parametrize(
    ("device", "setting", "converted"), [("cuda", "graphs", True), ("cuda", "off", False), ("cpu", "graphs", False)]
)
def test_layout_is_used_on_a_gpu_unless_acceleration_is_off(
    device: str,
    setting: Literal["graphs", "off"],
    converted: bool,
    v1_4_pipe: StableDiffusionPipeline,
    monkeypatch: pytest.MonkeyPatch,
):
    pipe = copy.deepcopy(v1_4_pipe)
    monkeypatch.setattr(StableDiffusionPipeline, "device", torch.device(device))
    monkeypatch.setattr(acceleration, "Capture", lambda: lambda step, inputs: step)
    acceleration.accelerate(pipe, Settings(acceleration=setting))
    for model in (pipe.unet, pipe.vae):
        convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
        assert all(in_channels_last(each.weight) for each in convolutions) == converted
        assert {type(module) in FASTER.values() for module in model.modules()} == {False, *[True] * converted}
