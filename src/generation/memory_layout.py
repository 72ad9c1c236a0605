"""The memory layout in which a GPU computes a model fastest.

Tensor cores compute convolutions in ``channels_last``. With PyTorch's default layout, cuDNN converts the weights, the
input and the output of every convolution at every step.
"""

import math
import types

import torch
from diffusers import ModelMixin, Transformer2DModel
from diffusers.models.activations import GEGLU
from torch.nn import GroupNorm
from torch.nn.functional import gelu, linear


def use_fastest_layout(model: ModelMixin) -> None:
    """Converts the convolutions' weights in place, and replaces what would convert or scatter activations.

    The results are the same up to rounding. PyTorch 2.13 computes a group norm in its default layout only; when it can
    do without (https://github.com/pytorch/pytorch/pull/191945), ``_group_norm`` can go.
    """
    model.to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, GroupNorm):
            module.forward = types.MethodType(_group_norm, module)  # type: ignore[method-assign]
        elif isinstance(module, GEGLU):
            module.forward = types.MethodType(_geglu, module)
        elif isinstance(module, Transformer2DModel):
            module._get_output_for_continuous_inputs = types.MethodType(_output, module)


def _group_norm(norm: GroupNorm, hidden_states: torch.Tensor) -> torch.Tensor:
    """``GroupNorm.forward``, for (images, channels, height, width) in ``channels_last`` without a copy."""
    if not hidden_states.is_contiguous(memory_format=torch.channels_last):
        return GroupNorm.forward(norm, hidden_states)
    images, channels, height, width = hidden_states.shape
    per_group = norm.num_groups, channels // norm.num_groups
    groups = hidden_states.permute(0, 2, 3, 1).view(images, height * width, *per_group)
    weight, bias = norm.weight.view(per_group), norm.bias.view(per_group)
    std, mean = torch.std_mean(groups, dim=(1, 3), correction=0, keepdim=True)
    # sqrt(variance + eps) without the variance, which may exceed float16
    scale = weight / torch.hypot(std, torch.tensor(math.sqrt(norm.eps)))
    shift = torch.addcmul(bias, mean, scale, value=-1)
    return torch.addcmul(shift, groups, scale).view(images, height, width, channels).permute(0, 3, 1, 2)


def _geglu(geglu: GEGLU, hidden_states: torch.Tensor) -> torch.Tensor:
    """``GEGLU.forward``, with two products that are contiguous in place of two halves of one that are not."""
    (weight, gate_weight), (bias, gate_bias) = geglu.proj.weight.chunk(2), geglu.proj.bias.chunk(2)
    return linear(hidden_states, weight, bias) * gelu(linear(hidden_states, gate_weight, gate_bias))


def _output(
    transformer: Transformer2DModel,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    batch_size: int,
    height: int,
    width: int,
    inner_dim: int,
) -> torch.Tensor:
    """diffusers' ``_get_output_for_continuous_inputs`` without its ``contiguous()``.

    Args:
        hidden_states: (images, height * width, channels).
        residual: (images, channels, height, width).
    """
    if transformer.use_linear_projection:
        hidden_states = transformer.proj_out(hidden_states)
    hidden_states = hidden_states.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    if not transformer.use_linear_projection:
        hidden_states = transformer.proj_out(hidden_states)
    return hidden_states + residual
