"""PixArt with what a run trains on it: frozen weights in the run's precision, and fp32 adapters."""

import torch

from diffusers_grad import attention
from medart_core import full_size, lora_layers, pretrained
from medart_core.pretrained import PixArt


def build(
    dtype: torch.dtype,
    device: torch.device,
    *,
    pretrained_model_name_or_path: str | None,
    revision: str | None,
    variant: str | None,
    cache_dir: str | None,
    random_weights: bool,
    text_encoder_quantization: str | None,
    rank: int,
    lora_alpha: float | None,
    use_dora: bool,
    use_rslora: bool,
    no_text_encoder_lora: bool,
    gradient_checkpointing: bool,
    seed: int,
) -> PixArt:
    """The options of these names, built; all dropout is off, and the adapters are equal on all processes."""
    if random_weights:
        model = full_size.build_random(dtype, device, quantize=text_encoder_quantization)
    else:
        where = pretrained_model_name_or_path, dtype, device, revision, variant
        model = pretrained.load(*where, text_encoder_quantization, cache_dir)
    attention.install(model.transformer)
    pretrained.set_gradient_checkpointing(model, gradient_checkpointing)
    torch.manual_seed(seed)  # of the adapters' initialisation
    shape = rank, lora_alpha, model.name, use_dora, use_rslora
    model.transformer = lora_layers.attach(model.transformer, lora_layers.TRANSFORMER_TARGETS, *shape)
    if not no_text_encoder_lora:
        model.text_encoder = lora_layers.attach(model.text_encoder, lora_layers.TEXT_ENCODER_TARGETS, *shape)
    return model
