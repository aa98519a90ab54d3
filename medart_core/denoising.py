"""PixArt's own loss: predict the noise in the latents of captioned images, in training and on held-out images."""

import torch
from torch import Tensor

from diffusers_grad import size_conditions
from medart_core import data, latents
from medart_core.objectives import min_snr_weights, noise_prediction_loss
from medart_core.pretrained import PixArt
from medart_core.seeds import SharedDraws
from medart_core.text import encode_prompts

VALIDATION_STREAM, VALIDATION_BATCH = 3, 8


def denoising_loss(
    model: PixArt,
    noise_scheduler,
    batch: dict,
    draws: SharedDraws,
    *,
    max_token_length: int,
    proportion_empty_prompts: float = 0.0,
    noise_offset: float = 0.0,
    snr_gamma: float | None = None,
) -> Tensor:
    """Noise-prediction loss of one micro-batch at random timesteps, a scalar; all random numbers come from `draws`.

    `batch` is what `data.collate` makes of a `CaptionDataset` or a `LatentDataset`. A share of the captions is
    replaced by the empty one; `noise_offset` adds a constant to each channel's noise; `snr_gamma` weights by min-SNR.
    """
    device = model.vae.device
    moments = batch["moments"] if "moments" in batch else latents.encode_moments(model.vae, batch["pixel_values"])
    shape = moments.shape[2:]
    clean = latents.sample_latents(model.vae, moments.to(device), draws.normal(*shape).to(device))
    noise = draws.normal(*shape).to(device)
    timesteps = draws.integers(noise_scheduler.config.num_train_timesteps).to(device)
    dropped = (draws.uniform() < proportion_empty_prompts).tolist()
    if noise_offset:
        noise = noise + noise_offset * draws.normal(shape[0], 1, 1).to(device)
    captions = ["" if drop else caption for drop, caption in zip(dropped, batch["captions"], strict=True)]
    prompt_embeds, mask = encode_prompts(model.tokenizer, model.text_encoder, captions, max_token_length)
    noisy_latents = noise_scheduler.add_noise(clean, noise, timesteps)
    prediction = model.transformer(
        noisy_latents,
        encoder_hidden_states=prompt_embeds,
        encoder_attention_mask=mask,
        timestep=timesteps,
        added_cond_kwargs=size_conditions(model.transformer, noisy_latents, len(noisy_latents), noisy_latents.dtype),
    ).sample
    weights = None
    if snr_gamma is not None:
        weights = min_snr_weights(noise_scheduler.alphas_cumprod, timesteps, snr_gamma)
    return noise_prediction_loss(prediction, noise, weights)


@torch.no_grad()
def validation_loss(model: PixArt, noise_scheduler, held_out, max_token_length: int) -> float:
    """Mean noise loss over a dataset's images, with the same noise and timesteps at every call and in every run."""
    total = 0.0
    for start in range(0, len(held_out), VALIDATION_BATCH):
        rows = [held_out[0, index] for index in range(len(held_out))[start : start + VALIDATION_BATCH]]
        draws = SharedDraws((VALIDATION_STREAM, start), len(rows))
        loss = denoising_loss(model, noise_scheduler, data.collate(rows), draws, max_token_length=max_token_length)
        total += len(rows) * loss.item()
    return total / len(held_out)
