"""Sampling from one prefill, as often as it takes: cache, one-token step and Gumbel-max choice for a Llama.

The step runs the language model's own modules, without what a general forward pass does around them for each token.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava_next_captioner.engines import stream_seed

# Attention layers made of q_proj, k_proj, v_proj, o_proj and rotary positions, which is what `_step` relies on.
FAMILIES = ("llama", "mistral", "qwen2")


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: of the `top_k` likeliest, as many as make up `top_p`; at temperature 0 the first."""

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 0.9
    max_new_tokens: int = 150


@dataclass
class Prefill:
    """What a language model keeps of B prompts of up to P tokens, padded on the left, with room for T new tokens.

    `cache` holds the keys and values of each layer, (B, heads, P + T, head size); the room may be written to again and
    again. `lengths` and `logits` (of the first new token) are (B,) and (B, vocabulary).
    """

    cache: list[tuple[Tensor, Tensor]]
    lengths: Tensor
    logits: Tensor
    padded: int

    @classmethod
    def empty(cls, model: Any, rows: int, padded: int, room: int) -> "Prefill":
        """Zeros of the right shapes for `model`, a LlavaNextForConditionalGeneration."""
        config = model.config.text_config
        attention = model.model.language_model.layers[0].self_attn
        like = {"dtype": model.dtype, "device": model.device}
        shape = (rows, config.num_key_value_heads, padded + room, attention.head_dim)
        cache = [(torch.zeros(shape, **like), torch.zeros(shape, **like)) for _ in range(config.num_hidden_layers)]
        lengths = torch.zeros(rows, dtype=torch.long, device=model.device)
        return cls(cache, lengths, torch.zeros(rows, config.vocab_size, **like), padded)

    def fill(self, rows: list[int], lengths: Tensor, layers: Any, logits: Tensor) -> None:
        """Take over a batch that was run by itself, whose prompts end where all prompts end."""
        for (keys, values), layer in zip(self.cache, layers, strict=True):
            start = self.padded - layer.keys.shape[2]
            keys[rows, :, start : self.padded] = layer.keys
            values[rows, :, start : self.padded] = layer.values
        self.lengths[rows] = lengths
        self.logits[rows] = logits

    def select(self, rows: list[int]) -> "Prefill":
        """These rows, repeated where they are named more than once; all of them in order are not copied."""
        if rows == list(range(len(self.lengths))):
            return self
        index = torch.tensor(rows, device=self.lengths.device)
        cache = [(keys[index], values[index]) for keys, values in self.cache]
        return Prefill(cache, self.lengths[index], self.logits[index], self.padded)

    def mask(self) -> Tensor | None:
        """What is added to attention scores, (B, 1, 1, P + T): -inf on the padding; None where there is none."""
        if bool((self.lengths == self.padded).all()):
            return None
        keys = self.cache[0][0]
        place = torch.arange(keys.shape[2], device=keys.device)
        return keys.new_zeros(len(keys), 1, 1, keys.shape[2]).masked_fill_(
            (place < (self.padded - self.lengths)[:, None])[:, None, None], -torch.inf
        )


def gumbel_noise(seed: int, name: str, attempt: int, sampling: Sampling) -> Tensor:
    """Gumbel noise for each token and rank of a candidate, (max_new_tokens, top_k): it depends on its names only."""
    generator = torch.Generator().manual_seed(stream_seed(seed, name, attempt))
    return -torch.log(-torch.log(torch.rand(sampling.max_new_tokens, sampling.top_k, generator=generator)))


def choose(logits: Tensor, noise: Tensor, sampling: Sampling) -> Tensor:
    """One token per row, (B,), drawn from (B, vocabulary) logits with (B, top_k) Gumbel noise."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scores, tokens = logits.float().topk(min(sampling.top_k, logits.shape[-1]))
    scores = torch.log_softmax(scores / sampling.temperature, -1)
    before = scores.exp().cumsum(-1) - scores.exp()  # the mass of all that are likelier
    scores = (scores + noise[:, : scores.shape[-1]]).masked_fill_(before >= sampling.top_p, -torch.inf)
    return tokens.gather(1, scores.argmax(-1, keepdim=True))[:, 0]


@torch.inference_mode()
def decode(model: Any, prefill: Prefill, noise: Tensor, sampling: Sampling, stops: Tensor) -> list[list[int]]:
    """Continue each row of `prefill` until a token of `stops` or `max_new_tokens`; the stop is part of the result.

    `noise` is (B, max_new_tokens, top_k). Rows that have stopped leave the batch once they are half of it.
    """
    language_model = model.model.language_model
    device = prefill.lengths.device
    steps = torch.arange(sampling.max_new_tokens, device=device)
    cos, sin = language_model.rotary_emb(prefill.logits, prefill.lengths[:, None] + steps)
    mask, cache, noise = prefill.mask(), prefill.cache, noise.to(device)
    rows = torch.arange(len(noise), device=device)
    stopped = torch.zeros(len(noise), dtype=torch.bool, device=device)
    written = torch.full((len(noise), sampling.max_new_tokens), -1, dtype=torch.long, device=device)
    logits = prefill.logits
    look_every = 1 if device.type == "cpu" else 8  # to look is to wait for the device
    for step in range(sampling.max_new_tokens):
        tokens = choose(logits, noise[:, step], sampling)
        written[rows, step] = tokens.masked_fill(stopped, -1)
        stopped |= torch.isin(tokens, stops)
        if step + 1 == sampling.max_new_tokens:
            break
        if (step + 1) % look_every == 0:
            going = (~stopped).nonzero()[:, 0]
            if len(going) == 0:
                break
            if 2 * len(going) <= len(rows):
                rows, stopped, tokens, noise = rows[going], stopped[going], tokens[going], noise[going]
                cos, sin, mask = cos[going], sin[going], None if mask is None else mask[going]
                cache = [(keys[going], values[going]) for keys, values in cache]
        hidden = _step(language_model, tokens, cache, prefill.padded + step, cos[:, step], sin[:, step], mask)
        logits = model.lm_head(hidden)
    return [[token for token in row if token >= 0] for row in written.tolist()]


def _step(
    language_model: Any,
    tokens: Tensor,
    cache: list[tuple[Tensor, Tensor]],
    place: int,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Write `tokens` (B,) into the cache at `place`; the last hidden state (B, size) of each row."""
    hidden = language_model.embed_tokens(tokens)
    seen = None if mask is None else mask[..., : place + 1]
    for layer, (keys, values) in zip(language_model.layers, cache, strict=True):
        attention = layer.self_attn
        heads = (len(tokens), -1, attention.head_dim)
        normed = layer.input_layernorm(hidden)
        query, key = attention.q_proj(normed).view(heads), attention.k_proj(normed).view(heads)
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        keys[:, :, place] = key
        values[:, :, place] = attention.v_proj(normed).view(heads)
        # The query heads that share a key head stand where a sequence of queries would: nothing is repeated.
        grouped = query.view(len(tokens), keys.shape[1], -1, attention.head_dim)
        attended = F.scaled_dot_product_attention(
            grouped, keys[:, :, : place + 1], values[:, :, : place + 1], seen, scale=attention.scaling
        )
        hidden = hidden + attention.o_proj(attended.reshape(len(tokens), -1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return language_model.norm(hidden)
