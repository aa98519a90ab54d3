"""Sampling from one prefill, as often as it takes: cache, one-token step and Gumbel-max choice for a Llama.

The step runs the language model's own modules, without what a general forward pass does around them for each token.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
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
    """What a language model keeps of B prompts of up to P tokens, with room for T new ones after them.

    `cache` holds keys, (B, heads, head size, P + T), and values, (B, heads, P + T, head size), of each layer: the keys
    lie as a product with one query reads them fastest. All prompts end at P, shorter ones start later; the room may be
    written to again and again. `lengths` (B,) are the prompts', `logits` (B, vocabulary) the first new token's.
    """

    cache: list[tuple[Tensor, Tensor]]
    lengths: Tensor
    logits: Tensor
    longest: int

    @classmethod
    def empty(cls, model: Any, lengths: Tensor, room: int) -> "Prefill":
        """Zeros of the right shapes for `model`, a LlavaNextForConditionalGeneration."""
        config = model.config.text_config
        longest = int(lengths.max())
        like = {"dtype": model.dtype, "device": model.device}
        head_dim = model.model.language_model.layers[0].self_attn.head_dim
        each = (len(lengths), config.num_key_value_heads)
        cache = [
            (
                torch.zeros(*each, head_dim, longest + room, **like),
                torch.zeros(*each, longest + room, head_dim, **like),
            )
            for _ in range(config.num_hidden_layers)
        ]
        return cls(cache, lengths.to(model.device), torch.zeros(len(lengths), config.vocab_size, **like), longest)

    def fill(self, rows: list[int], layers: Any, logits: Tensor) -> None:
        """Take over the prompts of `rows`, which were run together from position 0 on."""
        for place, row in enumerate(rows):
            length = int(self.lengths[row])
            for (keys, values), layer in zip(self.cache, layers, strict=True):
                keys[row, :, :, self.longest - length : self.longest] = layer.keys[place, :, :length].mT
                values[row, :, self.longest - length : self.longest] = layer.values[place, :, :length]
        self.logits[rows] = logits

    def select(self, rows: list[int]) -> "Prefill":
        """These rows, repeated where they are named more than once; all of them in order are not copied."""
        if rows == list(range(len(self.lengths))):
            return self
        index = torch.tensor(rows, device=self.lengths.device)
        cache = [(keys[index], values[index]) for keys, values in self.cache]
        return Prefill(cache, self.lengths[index], self.logits[index], self.longest)

    def mask(self) -> Tensor | None:
        """What to add to attention scores, (B, 1, 1, P + T): -inf before a prompt's start; None if all start at 0."""
        if bool((self.lengths == self.longest).all()):
            return None
        keys = self.cache[0][0]
        place = torch.arange(keys.shape[3], device=keys.device)
        return keys.new_zeros(len(keys), 1, 1, keys.shape[3]).masked_fill_(
            (place < (self.longest - self.lengths)[:, None])[:, None, None], -torch.inf
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
def decode(model: Any, prefill: Prefill, noise: Tensor, sampling: Sampling, stop_ids: list[int]) -> list[list[int]]:
    """Continue each row of `prefill` until a token of `stop_ids` or `max_new_tokens`; the stop is part of the result.

    `noise` is (B, max_new_tokens, top_k). Rows that have stopped leave the batch once they are half of it.
    """
    language_model = model.model.language_model
    device = prefill.lengths.device
    stops = torch.tensor(stop_ids, device=device)
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
        hidden = _step(language_model, tokens, cache, prefill.longest + step, cos[:, step], sin[:, step], mask)
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
        keys[..., place] = key
        values[:, :, place] = attention.v_proj(normed).view(heads)
        # The query heads that share a key head stand where a sequence of queries would: nothing is repeated.
        grouped = query.view(len(tokens), keys.shape[1], -1, attention.head_dim)
        scores = grouped @ keys[..., : place + 1]
        scores = scores * attention.scaling if seen is None else torch.add(seen, scores, alpha=attention.scaling)
        shares = scores.softmax(-1, dtype=torch.float32).to(hidden.dtype)
        attended = shares @ values[:, :, : place + 1]
        hidden = hidden + attention.o_proj(attended.reshape(len(tokens), -1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return language_model.norm(hidden)
