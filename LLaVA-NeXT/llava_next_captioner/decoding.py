"""Sampling from one prefill, as often as it takes: the cache, the choice of tokens and the loop over them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_next_captioner.engines import CaptionerError, stream_seed
from llava_next_captioner.token_step import Cache, TokenStep

LOOK_EVERY = {"cpu": 1}  # steps after which it is asked who has stopped; elsewhere that means to wait for the device


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: of the `top_k` likeliest, as many as make up `top_p`; at temperature 0 the first."""

    temperature: float = 0.8
    top_k: int = 50  # 1 to 1,000
    top_p: float = 0.9
    max_new_tokens: int = 150

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= 1000:
            raise CaptionerError(f"top_k is {self.top_k}: give a number between 1 and 1000")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1:
            raise CaptionerError(
                f"temperature is {self.temperature}, top_p {self.top_p}, max_new_tokens {self.max_new_tokens}: "
                "give 0 or more, above 0 and at most 1, 1 or more"
            )


@dataclass
class Prefill:
    """What a language model keeps of B prompts of up to P tokens, with room for T new ones after them.

    `cache` holds keys, (B, heads, head size, P + T), and values, (B, heads, P + T, head size), of each layer: the keys
    lie as a product with one query reads them fastest. All prompts end at P, shorter ones start later; the room may be
    written to again and again. `lengths` (B,) are the prompts', `logits` (B, vocabulary) the first new token's.
    """

    cache: Cache
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
def decode(
    token_step: TokenStep, prefill: Prefill, noise: Tensor, sampling: Sampling, stop_ids: list[int]
) -> list[list[int]]:
    """Continue each row of `prefill` until a token of `stop_ids` or `max_new_tokens`; the stop is part of the result.

    `noise` is (B, max_new_tokens, top_k). Rows that have stopped leave the batch once they are half of it.
    """
    device = prefill.lengths.device
    stops = torch.tensor(stop_ids, device=device)
    steps = torch.arange(sampling.max_new_tokens, device=device)
    cos, sin = token_step.rotations(prefill.lengths[:, None] + steps)
    mask, cache, noise = prefill.mask(), prefill.cache, noise.to(device)
    rows = torch.arange(len(noise), device=device)
    stopped = torch.zeros(len(noise), dtype=torch.bool, device=device)
    written = torch.full((len(noise), sampling.max_new_tokens), -1, dtype=torch.long, device=device)
    logits = prefill.logits
    look_every = LOOK_EVERY.get(device.type, 8)
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
        logits = token_step(tokens, cache, prefill.longest + step, cos[:, step], sin[:, step], mask)
    return [[token for token in row if token >= 0] for row in written.tolist()]
