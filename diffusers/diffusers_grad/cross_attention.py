"""What PixArt makes of the prompt, computed once per rollout: the projected caption's keys and values in each block.

The prompt is the same at all steps of a sampler, and so are these. They enter the network as arguments, with a graph
of their own, in which the gradients of all steps add up; a recomputation of steps or blocks finds them again.
"""

from __future__ import annotations

from typing import Any, cast

from diffusers import PixArtTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from diffusers_grad.attention import install, split_heads

# What the transformer passes without names when it checkpoints a block:
# https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/models/transformers/pixart_transformer_2d.py
BLOCK_ARGUMENTS = (
    "hidden_states",
    "attention_mask",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "timestep",
    "cross_attention_kwargs",
    "class_labels",
)


def prompt_arguments(transformer: nn.Module, prompt_embeds: Tensor) -> dict[str, Any]:
    """The arguments through which `transformer` reads a prompt (B, L, C), as often as it is called with them.

    A PixArt transformer gets the keys and values of its blocks; it is left able to read plain embeddings, too. Any
    other network gets the embeddings.
    """
    pixart = next((module for module in transformer.modules() if isinstance(module, PixArtTransformer2DModel)), None)
    if pixart is None:
        return {"encoder_hidden_states": prompt_embeds}
    install(pixart)
    caption = cast(nn.Module, pixart.caption_projection)(prompt_embeds)
    key_values = []
    for index, block in enumerate(cast(Any, pixart.transformer_blocks)):
        if not isinstance(block, PromptBlock):
            block.__class__, block.index = PromptBlock, index
        attention: Any = block.attn2
        key_values.append(
            (split_heads(attention, attention.to_k(caption)), split_heads(attention, attention.to_v(caption)))
        )
    # One token, for the projection that the transformer applies in each call, and nobody reads.
    return {"encoder_hidden_states": prompt_embeds[:, :1], "cross_attention_kwargs": {"key_values": key_values}}


class PromptBlock(BasicTransformerBlock):
    """A block that picks its own keys and values before any compiled code is entered, so that one graph serves all."""

    index: int

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        kwargs |= dict(zip(BLOCK_ARGUMENTS, args, strict=False))
        if kwargs["cross_attention_kwargs"]:
            key_values = kwargs["cross_attention_kwargs"]["key_values"][self.index]
            kwargs["cross_attention_kwargs"] = {"key_values": key_values}
        return super().__call__(**kwargs)
