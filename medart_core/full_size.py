"""The published PixArt-XL-2-512x512 in its exact shapes, with seeded random weights instead of a 22 GB download.

For measuring time and memory, and for trying a command out; its pictures are noise.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from torch import Tensor, nn
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from medart_core import quantization
from medart_core.pretrained import NANO, ROOT, PixArt

NAME = "random-weights"  # stands where the name of a pipeline does
PUBLISHED = "PixArt-alpha/PixArt-XL-2-512x512"

# What differs from the classes' defaults in the published configurations: T5 v1.1 XXL, the Stable Diffusion VAE (whose
# scaling factor, 0.18215, is the default), and the transformer for 512 px.
SHAPES: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    },
    "vae": {
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 256,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    },
    "transformer": {"sample_size": 64, "caption_channels": 4096},
}  # fmt: skip
SCHEDULER: dict[str, Any] = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def build_empty() -> tuple[Any, Any, Any]:
    """T5, VAE and transformer of the published shapes, without any memory behind them."""
    with torch.device("meta"):
        return (
            T5EncoderModel(T5Config(**SHAPES["text_encoder"])),
            AutoencoderKL(**SHAPES["vae"]),
            PixArtTransformer2DModel(**SHAPES["transformer"]),
        )


def build_random(dtype: torch.dtype, device: torch.device, seed: int = 0, quantize: str | None = None) -> PixArt:
    """A frozen PixArt of the published shapes, each tensor drawn on the device where it will stay.

    The weights follow from the seed and the kind of device; `dtype` only rounds them, so that a LoRA trained in bf16
    finds its base again in fp32. `quantize`, `int8` or `nf4`, is for T5. The tokenizer is the bundled model's: its
    ids are within T5's 32,128, and without trained weights it does not matter what they mean.
    """
    draws = torch.Generator(device).manual_seed(seed)
    text_encoder, vae, transformer = build_empty()
    # The table of positions is computed by the constructor and never stored: a model without blocks has it, too.
    without_blocks: dict[str, Any] = SHAPES["transformer"] | {"num_layers": 0}
    shallow: Any = PixArtTransformer2DModel(**without_blocks)
    transformer.pos_embed.pos_embed = shallow.pos_embed.pos_embed.to(device)
    if quantize:
        text_encoder = _with_quantized_layers(text_encoder, quantize, dtype)
    for model in (text_encoder, vae, transformer):
        _fill(model, dtype, device, draws)
        model.requires_grad_(False).eval()
    if quantize:
        quantization.finish(text_encoder, quantize)
    return PixArt(
        tokenizer=AutoTokenizer.from_pretrained(ROOT / NANO / "tokenizer"),
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(**SCHEDULER),
        name=NAME,
    )


def _with_quantized_layers(text_encoder: nn.Module, kind: str, dtype: torch.dtype) -> nn.Module:
    from transformers.integrations import replace_with_bnb_linear

    settings = quantization.config(kind, dtype)
    text_encoder = replace_with_bnb_linear(text_encoder, quantization_config=settings)
    setattr(text_encoder, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)  # read by PEFT
    return text_encoder


@torch.no_grad()
def _fill(model: nn.Module, dtype: torch.dtype, device: torch.device, draws: torch.Generator) -> None:
    """Replace a model's empty parameters by random ones; those that are shared stay shared."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            if empty not in made:
                values = torch.empty(empty.shape, dtype=torch.float32, device=device)
                if name == "weight" and values.dim() == 1:  # a norm
                    values.fill_(1)
                elif name == "bias":
                    values.fill_(0)
                else:
                    limit = 3**0.5 * _std(path, module, values)  # uniform: three times as fast as normal on a CPU
                    values.uniform_(-limit, limit, generator=draws)
                made[empty] = _packed(values.to(dtype), empty)
            setattr(module, name, made[empty])


def _std(path: str, module: nn.Module, values: Tensor) -> float:
    """Standard deviation that keeps activations near 1: the inputs' number to the power -1/2, with few exceptions."""
    if isinstance(module, nn.Embedding):
        return 1.0
    std = (len(values) / values.numel()) ** 0.5
    if path.endswith(".q"):
        return std / 8  # T5 does not divide its attention scores by the root of d_kv = 64
    if path == "proj_out":
        return std / 10  # a small predicted noise keeps long rollouts and their gradients in bounds
    return std


def _packed(values: Tensor, empty: nn.Parameter) -> nn.Parameter:
    """`values` as a parameter of `empty`'s kind: a plain one, or one that bitsandbytes packs when it is moved."""
    if type(empty) is nn.Parameter:
        return nn.Parameter(values)
    kind: Any = type(empty)
    return kind(values, requires_grad=False, **vars(empty)).to(values.device)
