"""Captions encoded once, where T5 has no adapters: it is then unloaded, and a table of embeddings takes its place."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from medart_core.errors import UserError
from medart_core.pretrained import PixArt
from medart_core.text import clean, encode_prompts

ENCODING_BATCH = 8


class CachedTextEncoder(nn.Module):
    """Answers like T5 for captions that were encoded before; it has no parameters.

    Embeddings lie on the CPU in the encoder's dtype, without their padding; padding comes back as zeros, which is
    masked in the transformer's cross-attention.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.embeddings: dict[tuple[int, ...], Tensor] = {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        """Token ids and mask (B, T), padded at the end -> prompt_embeds (B, T, C) on `device`, as a tuple of one."""
        lengths = attention_mask.sum(dim=1).tolist()
        try:
            rows = [self.embeddings[tuple(ids[:n])] for ids, n in zip(input_ids.tolist(), lengths, strict=True)]
        except KeyError:
            raise UserError(
                "a caption is not among the encoded ones, and T5 is unloaded; leave --no_text_encoder_lora out"
            ) from None
        padded = rows[0].new_zeros(len(rows), input_ids.shape[1], rows[0].shape[-1])
        for target, row in zip(padded, rows, strict=True):
            target[: len(row)] = row
        return (padded.to(self.device),)


@torch.no_grad()
def cache_embeddings(
    model: PixArt,
    captions: Sequence[str],
    max_token_length: int,
    autocast: AbstractContextManager,
    show_progress: bool,
) -> CachedTextEncoder:
    """Encode each caption once, and the empty one, in groups of equal shape: so none depends on its neighbours.

    With `model.text_encoder = cache_embeddings(model, ...)` nothing refers to T5 any more, and its memory is free.
    """
    tokenizer, encoder = model.tokenizer, model.text_encoder
    cached = CachedTextEncoder(encoder.device)
    distinct = list(dict.fromkeys(clean(caption) for caption in ["", *captions]))
    starts = range(0, len(distinct), ENCODING_BATCH)
    with autocast:
        for start in tqdm(starts, desc="encoding captions", disable=not show_progress):
            group = distinct[start : start + ENCODING_BATCH]
            padded = group + [""] * (ENCODING_BATCH - len(group))
            embeds, _ = encode_prompts(tokenizer, encoder, padded, max_token_length, pad_to=max_token_length)
            tokens = tokenizer(group, max_length=max_token_length, truncation=True).input_ids
            for ids, row in zip(tokens, embeds.cpu()):  # noqa: B905 (the group may be shorter than its padding)
                cached.embeddings[tuple(ids)] = row[: len(ids)].clone()
    return cached
