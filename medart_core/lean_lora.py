"""The forward pass of PEFT's linear LoRA layers in fewer operations; PEFT stays the format and the reference.

Under autocast PEFT casts each layer's input to the adapter's fp32, where autocast casts it back, keeps that copy for
backward beside the base layer's, and multiplies and adds in passes of their own. Here the input is cast once for base
and adapter, and `addmm` scales and adds: y = W x + s B (A x). Within `merged` even that becomes one product.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional as F


class LeanLinear(Linear):
    """PEFT's LoRA layer, with its state and names; what is not one plain adapter runs as PEFT's own."""

    product: "MergedLinear | None" = None  # not `merged`, by which PEFT says that an adapter is in the weights

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """(..., in_features) -> (..., out_features), in the autocast dtype or else that of `x`."""
        if self.product is not None:
            return self.product(x)
        if args or kwargs or not self.is_plain():
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        lora_a = cast(Tensor, self.lora_A[name].weight)  # (rank, in_features)
        lora_b = cast(Tensor, self.lora_B[name].weight)  # (out_features, rank)
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        elif x.dtype != lora_a.dtype:
            return super().forward(x)
        base = self.base_layer(x)
        flat = base.reshape(-1, base.shape[-1])
        low_rank = F.linear(x, lora_a).reshape(-1, lora_a.shape[0])
        return torch.addmm(flat, low_rank, lora_b.t(), alpha=self.scaling[name]).view(base.shape)

    def is_plain(self) -> bool:
        """One active, unmerged adapter without dropout, bias or a variant such as DoRA."""
        adapters = self.active_adapters
        return (
            len(adapters) == 1
            and adapters[0] in self.lora_A
            and adapters[0] not in self.lora_variant
            and not (self.disable_adapters or self.merged_adapters or self.lora_bias[adapters[0]])
            and not (self.training and isinstance(self.lora_dropout[adapters[0]], nn.Dropout))
        )


def enable(model: nn.Module) -> int:
    """Give the LoRA layers on plain linear layers of `model` the lean forward; returns how many.

    Layers on quantised weights and convolutions keep PEFT's: the former don't cast, of the latter PixArt has one.
    """
    layers = [module for module in model.modules() if type(module) is Linear]
    for layer in layers:
        layer.__class__ = LeanLinear
    return len(layers)


def disable(model: nn.Module) -> None:
    """Give the layers PEFT's own forward back, to compare with."""
    for module in model.modules():
        if type(module) is LeanLinear:
            module.__class__ = Linear  # pyright: ignore[reportAttributeAccessIssue]


class MergedLinear:
    """LoRA layers of one input as one product with W' = W + s B A, made once for many calls.

    The gradient is exactly that of the merged product, and takes the low-rank way to A and B. W' has the base's dtype:
    in bf16 it is rounded, by up to 0.4 % of each weight, where the separate adapter's share is not.
    """

    def __init__(self, layers: Sequence[LeanLinear]) -> None:
        names = [layer.active_adapters[0] for layer in layers]
        lora_a = [cast(Tensor, layer.lora_A[name].weight) for layer, name in zip(layers, names, strict=True)]
        lora_b = [layer.lora_B[name].weight * layer.scaling[name] for layer, name in zip(layers, names, strict=True)]
        self.factors = torch.cat(lora_a), torch.block_diag(*lora_b)  # (ranks, in), (outs, ranks) with a graph, fp32
        with torch.no_grad():
            base = torch.cat([cast(Tensor, layer.base_layer.weight) for layer in layers])
            self.weight = torch.addmm(base.to(lora_b[0].dtype), *self.factors[::-1]).to(base.dtype)
            self.low = tuple(factor.to(base.dtype) for factor in self.factors)
        biases = [cast(Tensor | None, layer.base_layer.bias) for layer in layers]
        self.bias = None if biases[0] is None else torch.cat(cast(Any, biases))

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features of all layers)."""
        return _MergedProduct.apply(x.to(self.weight.dtype), self.weight, self.bias, *self.low, *self.factors)


class _MergedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, low_a, low_b, lora_a, lora_b) -> Tensor:
        ctx.save_for_backward(x, weight, low_a, low_b)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, low_a, low_b = ctx.saved_tensors
        grad = grads[0].to(weight.dtype)
        rows, grad_rows = x.flatten(0, -2), grad.flatten(0, -2)
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_a = (grad_rows @ low_b).t() @ rows
        grad_b = grad_rows.t() @ F.linear(rows, low_a)
        # The engine adds up in the factors' own fp32.
        return grad_x, None, None, None, None, grad_a, grad_b


@contextmanager
def merged(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Within it the LoRA layers of a PixArt transformer are merged, if `wanted`, those of a self-attention in one.

    For many calls between two updates, and one `backward` through them all. Layers that read the prompt alone stay as
    they are, for a rollout calls them once.
    """
    products = _products(model) if wanted else []
    for holder, name, layers in products:
        setattr(holder, name, MergedLinear(layers))
    try:
        yield
    finally:
        for holder, name, _ in products:
            delattr(holder, name)


def _products(model: nn.Module) -> list[tuple[nn.Module, str, list[LeanLinear]]]:
    """Which layers are merged into one, and the module and attribute that their product is looked for in."""
    products: list[tuple[nn.Module, str, list[LeanLinear]]] = []
    apart: set[nn.Module] = set()
    for attention in (module for module in model.modules() if isinstance(module, Attention)):
        group: list[Any] = [attention.to_q, attention.to_k, attention.to_v]
        if attention.is_cross_attention:
            apart.update(group[1:])
        elif all(isinstance(layer, LeanLinear) and layer.is_plain() for layer in group):
            apart.update(group)
            products.append((attention, "to_qkv", group))
    for layer in model.modules():
        if isinstance(layer, LeanLinear) and layer.is_plain() and layer not in apart:
            products.append((layer, "product", [layer]))
    return products
