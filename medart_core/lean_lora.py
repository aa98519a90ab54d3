"""The forward pass of PEFT's linear LoRA layers in fewer operations; PEFT stays the format and the reference.

Under autocast PEFT casts each layer's input to the adapter's fp32, where autocast casts it back, keeps that copy for
backward beside the base layer's, and multiplies and adds in passes of their own. Here the input is cast once for base
and adapter, and `addmm` scales and adds: y = W x + s B (A x).
"""

from typing import cast

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional as F


class LeanLinear(Linear):
    """PEFT's LoRA layer, with its state and names; what is not one plain adapter runs as PEFT's own."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """(..., in_features) -> (..., out_features), in the autocast dtype or else that of `x`."""
        if args or kwargs or not self._is_plain():
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

    def _is_plain(self) -> bool:
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
