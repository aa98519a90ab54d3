"""A PixArt pipeline of the published depth or less with narrow layers and random weights, and inputs for its steps."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from torch import Tensor, nn
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from diffusers_grad import attention
from medart_core import compilation, devices, lean_lora, lora_layers, pretrained
from medart_core.latents import encode_moments

ROOT = Path(__file__).resolve().parents[1]
HEAD = 64  # width of an attention head
LONG = "an endoscopic image of dyed lifted polyps with a smooth surface, " * 12  # more than 120 tokens
SHORT = "an endoscopic image of dyed lifted polyps"


@dataclass(frozen=True)
class Shape:
    """Layers of the transformer and of T5, width of both, side of the latents, widths of the VAE and layers in each.

    The narrow VAE takes the share of a step that the published one takes of a step of full size.
    """

    layers: int
    text_layers: int
    width: int
    side: int
    vae_channels: tuple[int, ...] = (16, 16, 16, 16)
    vae_layers: int = 1


def write_pipeline(folder: Path, shape: Shape) -> None:
    """Save such a pipeline, for both sides of a comparison to load."""
    torch.manual_seed(0)
    heads, width = shape.width // HEAD, shape.width
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "nano" / "pixart" / "tokenizer")
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=width, d_kv=HEAD, num_heads=heads, d_ff=5 * width // 2,
            num_layers=shape.text_layers, feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 4,  # pyright: ignore[reportArgumentType]
        block_out_channels=shape.vae_channels,  # pyright: ignore[reportArgumentType]
        layers_per_block=shape.vae_layers, latent_channels=4, norm_num_groups=8, sample_size=8 * shape.side,
    )  # fmt: skip
    transformer = PixArtTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=HEAD, num_layers=shape.layers, cross_attention_dim=width,
        sample_size=shape.side, caption_channels=width, interpolation_scale=1,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    PixArtAlphaPipeline(tokenizer, text_encoder, vae, transformer, scheduler).save_pretrained(folder)


@dataclass
class Trainer:
    """A pipeline with adapters on the transformer and on T5, and their optimiser."""

    model: pretrained.PixArt
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    noise_scheduler: Any
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        """bf16 autocast, as accelerate sets it up, where the base is bf16."""
        return torch.autocast(self.model.vae.device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16)

    def update(self) -> None:
        """A clipped step of the optimiser: the same on both sides."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def make_trainer(
    folder: Path,
    dtype: torch.dtype,
    *,
    checkpointing: bool = False,
    lean: bool = True,
    own_attention: bool = True,
    compiled: bool = False,
) -> Trainer:
    """Load the pipeline with rank-8 adapters, none of them zero, blocks checkpointed or not."""
    device = devices.pick_device()
    model = pretrained.load(folder, dtype, device)
    pretrained.set_gradient_checkpointing(model, checkpointing)
    torch.manual_seed(1)
    model.transformer = lora_layers.attach(model.transformer, lora_layers.TRANSFORMER_TARGETS, rank=8)
    model.text_encoder = lora_layers.attach(model.text_encoder, lora_layers.TEXT_ENCODER_TARGETS, rank=8)
    parameters = [
        *lora_layers.trainable_parameters(model.transformer),
        *lora_layers.trainable_parameters(model.text_encoder),
    ]
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.02)
    if not lean:
        lean_lora.disable(model.transformer)
        lean_lora.disable(model.text_encoder)
    if own_attention:
        attention.install(model.transformer)
    if compiled:
        compilation.enable(model)
    optimizer = torch.optim.AdamW(parameters, 1e-5, fused=True)
    return Trainer(model, parameters, optimizer, DDPMScheduler.from_config(model.scheduler.config), dtype)


@dataclass(frozen=True)
class Batch:
    """One image with its caption and everything random of a step: the same for all that are compared."""

    pixel_values: Tensor
    moments: Tensor
    caption: str
    posterior_noise: Tensor
    noise: Tensor
    timesteps: Tensor
    rollout_noise: Tensor


def make_batch(trainer: Trainer, caption: str) -> Batch:
    """Random pixels and noise of the pipeline's size, and the pixels' latent moments as a cache would hold them."""
    generator, vae, side = torch.Generator().manual_seed(2), trainer.model.vae, trainer.model.image_size
    pixels = torch.rand(1, 3, side, side, generator=generator) * 2 - 1
    with trainer.autocast():
        moments = encode_moments(vae, pixels)
    noises = torch.randn(3, *moments[:, 0].shape, generator=generator).to(vae.device)
    timesteps = torch.tensor([400], device=vae.device)
    return Batch(pixels.to(vae.device), moments, caption, noises[0], noises[1], timesteps, noises[2])
