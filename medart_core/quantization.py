"""T5's frozen weights in 8 or 4 bits, through bitsandbytes; the adapters on it stay fp32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, T5PreTrainedModel

KINDS = ("int8", "nf4")
HEADROOM = 64.0


def config(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """LLM.int8 (arXiv:2208.07339), or NF4 with double quantisation (arXiv:2305.14314) that computes in `dtype`."""
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # T5 casts its activations to the dtype that `wo.weight` shows: packed as uint8 it would truncate them.
        bnb_4bit_quant_storage=dtype,
    )


@contextmanager
def every_layer() -> Iterator[None]:
    """Have `from_pretrained` quantise T5's `wo`, too, which it leaves alone for fear of fp16: a third of T5-XXL."""
    kept = T5PreTrainedModel._keep_in_fp32_modules
    T5PreTrainedModel._keep_in_fp32_modules = None
    try:
        yield
    finally:
        T5PreTrainedModel._keep_in_fp32_modules = kept


def finish(text_encoder: nn.Module, kind: str) -> None:
    """Check that no plain linear layer is left, and work around two things in bitsandbytes.

    `int8`: its CUDA kernel hands results on as fp16, where the largest of T5-XXL's `wo` overflow
    (https://github.com/huggingface/transformers/issues/20287). A power of two taken from the weights' scales and given
    back to the result costs no precision.
    `nf4`: some CPUs repack weights at the first call without gradient, for a kernel that has no backward pass.
    """
    plain = [name for name, module in text_encoder.named_modules() if type(module) is nn.Linear]
    assert not plain, f"not quantised: {', '.join(plain)}"
    for name, module in text_encoder.named_modules():
        if kind == "nf4" and isinstance(module, nn.Linear):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        elif kind == "int8" and name.endswith(".wo"):
            module.weight.SCB.div_(HEADROOM)  # type: ignore[union-attr]
            module.register_forward_hook(_give_back)


def _give_back(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
    return output * HEADROOM
