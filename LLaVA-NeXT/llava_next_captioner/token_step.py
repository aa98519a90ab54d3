"""One more token of each row, through a Llama's own weights but in fewer and larger operations than its modules take.

At one token a row, the number of operations is what costs: their launch on a GPU, Python on a CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Language models with layers of q_proj, k_proj, v_proj, o_proj, a gated MLP, RMS norms and rotary positions.
FAMILIES = ("llama", "mistral", "qwen2")
Cache = list[tuple[Tensor, Tensor]]  # keys (B, heads, head size, tokens) and values (B, heads, tokens, head size)


@dataclass(frozen=True)
class _Layer:
    module: Any
    qkv: tuple[Tensor, Tensor | None]
    gate_up: tuple[Tensor, Tensor | None]


class TokenStep:
    """The step of a `LlavaNextForConditionalGeneration` whose language model is of one of the `FAMILIES`."""

    def __init__(self, model: Any):
        self._model = model.model.language_model
        self._lm_head = model.lm_head
        self._layers = []
        for layer in self._model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            qkv = _joined([attention.q_proj, attention.k_proj, attention.v_proj])
            self._layers.append(_Layer(layer, qkv, _joined([mlp.gate_proj, mlp.up_proj])))

    def rotations(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (B, tokens, head size), of positions (B, tokens); the sines have `_rotate`'s signs."""
        cos, sin = self._model.rotary_emb(self._model.norm.weight, positions)
        first, second = sin.chunk(2, -1)
        return cos, torch.cat([-first, second], -1)

    def __call__(
        self, tokens: Tensor, cache: Cache, place: int, cos: Tensor, sin: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Logits (B, vocabulary) after `tokens` (B,), whose keys and values are written into the cache at `place`.

        `cos` and `sin` are (B, head size); `mask`, (B, 1, 1, at least place + 1), is added to the attention scores.
        """
        hidden = self._model.embed_tokens(tokens)
        cos, sin = cos[:, None], sin[:, None]
        seen = None if mask is None else mask[..., : place + 1]
        for layer, (keys, values) in zip(self._layers, cache, strict=True):
            attention, mlp = layer.module.self_attn, layer.module.mlp
            shared = keys.shape[1]
            normed = _norm(layer.module.input_layernorm, hidden)
            mixed = F.linear(normed, *layer.qkv).view(len(tokens), -1, attention.head_dim)
            rotated = _rotate(mixed[:, :-shared], cos, sin)
            keys[..., place] = rotated[:, -shared:]
            values[:, :, place] = mixed[:, -shared:]
            # The query heads that share a key head stand where a sequence of queries would: nothing is repeated.
            grouped = rotated[:, :-shared].view(len(tokens), shared, -1, attention.head_dim)
            scores = grouped @ keys[..., : place + 1]
            scores = scores * attention.scaling if seen is None else torch.add(seen, scores, alpha=attention.scaling)
            shares = scores.softmax(-1, dtype=torch.float32).to(hidden.dtype)
            attended = shares @ values[:, :, : place + 1]
            hidden = hidden + attention.o_proj(attended.reshape(len(tokens), -1))
            normed = _norm(layer.module.post_attention_layernorm, hidden)
            gate, up = F.linear(normed, *layer.gate_up).chunk(2, -1)
            hidden = hidden + mlp.down_proj(mlp.act_fn(gate) * up)
        return self._lm_head(_norm(self._model.norm, hidden))


def _norm(module: Any, hidden: Tensor) -> Tensor:
    return F.rms_norm(hidden, module.weight.shape, module.weight, module.variance_epsilon)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: halves of a head change places, and the sign of the first half's sine does what is left."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), sin)


def _joined(linears: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    """Weights and biases of several layers as one; the layers keep views of it, so that nothing is held twice."""
    sizes = [linear.out_features for linear in linears]
    weight = torch.cat([linear.weight for linear in linears])
    for linear, part in zip(linears, weight.split(sizes), strict=True):
        linear.weight = nn.Parameter(part, requires_grad=False)
    return weight, None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
