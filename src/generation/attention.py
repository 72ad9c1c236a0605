"""Attention slicing by PyTorch's fused attention."""

import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import Attention, SlicedAttnProcessor


class FusedSlicedAttnProcessor:
    """diffusers' ``SlicedAttnProcessor``, whose slices are computed by ``scaled_dot_product_attention``.

    The slices are the same: ``slice_size`` of the heads of all images in a row. Fused attention never holds a slice's
    scores in memory, which is all that diffusers' slices save, and needs one kernel where those need three.
    """

    def __init__(self, slice_size: int) -> None:
        self.slice_size = slice_size

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes attention in slices.

        Args:
            attn: the module, whose projections are used.
            hidden_states: (images, tokens, channels) or (images, channels, height, width).
            encoder_hidden_states: (images, tokens, channels) to attend to; by default ``hidden_states``.
            attention_mask: added to the scores, (images, 1, tokens attended to) or (images * heads, 1, tokens
                attended to).

        Returns:
            A tensor of the shape and dtype of ``hidden_states``.
        """
        residual, shape = hidden_states, hidden_states.shape
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(context))
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            context = hidden_states
        elif attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        query, key, value = (
            attn.head_to_batch_dim(projected)
            for projected in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        slices = [slice(start, start + self.slice_size) for start in range(0, len(query), self.slice_size)]
        # the fused kernels take four dimensions
        attended = [
            torch.nn.functional.scaled_dot_product_attention(
                query[None, part],
                key[None, part],
                value[None, part],
                attn_mask=None if mask is None else mask[None, part],
                scale=attn.scale,
            )
            for part in slices
        ]
        hidden_states = attn.batch_to_head_dim(torch.cat(attended, dim=1)[0])
        for layer in attn.to_out:
            hidden_states = layer(hidden_states)
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        hidden_states = hidden_states / attn.rescale_output_factor
        return hidden_states


def enable_attention_slicing(pipe: StableDiffusionPipeline, slice_size: str) -> None:
    """``pipe.enable_attention_slicing(slice_size)``, with each slice computed by fused attention."""
    pipe.enable_attention_slicing(slice_size)
    for module in pipe.unet.modules():
        # models with attention of another kind keep diffusers' slices
        if isinstance(module, Attention) and type(module.processor) is SlicedAttnProcessor:
            # half of a single head is none
            module.set_processor(FusedSlicedAttnProcessor(max(1, module.processor.slice_size)))
