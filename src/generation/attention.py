"""Attention slicing with PyTorch's fused attention."""

import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
)


class FusedSlicedAttnProcessor:
    """Computes attention in ``steps`` slices, each some of the heads of all images, with PyTorch's fused attention.

    diffusers' ``SlicedAttnProcessor`` holds the scores of a slice in memory; fused attention never holds any. The heads
    are split with views, so a slice costs one kernel and all of them one copy. Handles what ``SlicedAttnProcessor``
    does, and fused projections.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes attention in slices.

        Args:
            attn: the module whose projections are used.
            hidden_states: (images, tokens, channels) or (images, channels, height, width).
            encoder_hidden_states: (images, context tokens, channels) to attend to; by default ``hidden_states``.
            attention_mask: added to the scores, (images, 1, context tokens) or (images * heads, 1, context tokens).

        Returns:
            A tensor of the shape and dtype of ``hidden_states``.
        """
        residual, shape = hidden_states, hidden_states.shape
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attn.norm_cross and encoder_hidden_states is not None:
            context = attn.norm_encoder_hidden_states(context)
        if not attn.fused_projections:
            projected = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        elif attn.is_cross_attention:
            projected = attn.to_q(hidden_states), *attn.to_kv(context).chunk(2, dim=-1)
        else:
            projected = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        # the fused kernels expect (images, heads, tokens, channels of a head)
        query, key, value = (
            each.unflatten(2, (attn.heads, -1)).transpose(1, 2).chunk(self.steps, dim=1) for each in projected
        )
        mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(context))
        masks = [None] * self.steps if mask is None else mask.unflatten(0, (-1, attn.heads)).chunk(self.steps, dim=1)
        attended = [
            torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=m, scale=attn.scale).transpose(1, 2)
            for q, k, v, m in zip(query, key, value, masks, strict=False)
        ]
        hidden_states = (torch.cat(attended, dim=2) if len(attended) > 1 else attended[0]).flatten(2)
        for layer in attn.to_out:
            hidden_states = layer(hidden_states)
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        if attn.rescale_output_factor != 1:
            hidden_states = hidden_states / attn.rescale_output_factor
        return hidden_states


REPLACED = (SlicedAttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0, FusedSlicedAttnProcessor)
"""Processors that do what ``FusedSlicedAttnProcessor`` does."""


def enable_attention_slicing(pipe: StableDiffusionPipeline, slice_size: str) -> None:
    """Slices with fused attention: ``auto`` in two steps, ``max`` head by head, ``off`` all heads in one.

    Even without slices this saves kernels: diffusers' own attention divides its result by 1.
    """
    if slice_size != "off":
        pipe.enable_attention_slicing(slice_size)
    for module in pipe.unet.modules():
        # other kinds of attention keep diffusers' processors
        if isinstance(module, Attention) and type(module.processor) in REPLACED:
            steps = {"off": 1, "auto": 2}.get(slice_size, module.heads)
            module.set_processor(FusedSlicedAttnProcessor(steps))
