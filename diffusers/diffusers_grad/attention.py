"""PixArt's attention layers in fewer operations, and able to take keys and values that are ready.

Results are the stock processor's up to rounding. On a CPU the fused kernel takes most of its time for the gradient:
plain products in bf16 are three times as fast, at the price of scores that are kept, and rounded to bf16.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn import functional as F

KEPT_SCORES = 2**17  # per head, such as 1024 image tokens by 128 of the prompt: above it the fused kernel is as fast


def install(transformer: PixArtTransformer2DModel) -> None:
    """Give all attention layers of `transformer` the processor below; parameters and their names stay."""
    for module in transformer.modules():
        if isinstance(module, Attention) and not isinstance(module.processor, PixArtProcessor):
            module.set_processor(PixArtProcessor())  # pyright: ignore[reportArgumentType]


class PixArtProcessor:
    """Attention without what PixArt's layers lack: norms, a residual, spatial inputs."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        key_values: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(B, N, D) -> (B, N, D); where both are given, `key_values` stand for `encoder_hidden_states` (B, L, D)."""
        layers: Any = attn
        if encoder_hidden_states is None and hasattr(layers, "to_qkv"):
            projected = layers.to_qkv(hidden_states).chunk(3, dim=-1)
            query, key, value = (split_heads(attn, features) for features in projected)
        else:
            query = split_heads(attn, layers.to_q(hidden_states))
            if encoder_hidden_states is None or key_values is None:
                source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
                key_values = split_heads(attn, layers.to_k(source)), split_heads(attn, layers.to_v(source))
            key, value = key_values
        mask = None if attention_mask is None else attention_mask.unsqueeze(1)  # (B, 1, 1, L), a bias
        linear, dropout = layers.to_out
        return dropout(linear(attend(query, key, value, mask).transpose(1, 2).flatten(2)))


def split_heads(attn: Attention, features: Tensor) -> Tensor:
    """(B, L, heads * width) -> (B, heads, L, width)."""
    return features.unflatten(2, (attn.heads, -1)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention of (B, heads, N, width), perhaps with a bias on the scores."""
    few = query.shape[-2] * key.shape[-2] <= KEPT_SCORES
    if few and query.device.type == "cpu" and query.dtype == torch.bfloat16:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        if mask is not None:
            scores = scores + mask.to(scores.dtype)
        return scores.softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
