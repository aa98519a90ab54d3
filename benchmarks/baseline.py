"""The plain way to take Med-Art's steps: PEFT's layers, captions padded to 120, and the official pipeline.

Each step encodes its image, recomputes the blocks of the transformer, of T5 and of the decoder, sums the losses for a
single backward and reads them with `.item()`. The colour step calls `PixArtAlphaPipeline.__call__` without its
`no_grad`, which encodes the caption and the empty prompt one after the other, and may build two pipelines from their
folder each time, as the paper's code does: https://github.com/clguo/medart/blob/9647a926b1/medart.py#L937-L968
Dropout is off and losses and optimiser are ours, so that the results can be compared.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtAlphaPipeline
from thin_pixart import Batch, Trainer
from torch import Tensor

from medart_core.objectives import color_distribution_loss, noise_prediction_loss


def ordinary_step(trainer: Trainer, batch: Batch) -> tuple[float]:
    """One optimiser step on the noise-prediction loss, which is returned."""
    with trainer.autocast():
        loss = _noise_loss(trainer, batch)
    loss.backward()
    trainer.update()
    return (loss.item(),)


def hldf_step(
    trainer: Trainer, batch: Batch, pipelines: list[Any] | Path, num_inference_steps: int
) -> tuple[float, float]:
    """One optimiser step on the noise-prediction loss and the colour loss, which are returned.

    `pipelines` are the two pipelines, built once, or the folder to build them from.
    """
    with trainer.autocast():
        loss = _noise_loss(trainer, batch)
        if isinstance(pipelines, Path):
            pipelines = make_pipelines(trainer, pipelines)
        latents = PixArtAlphaPipeline.__call__.__wrapped__(  # pyright: ignore[reportFunctionMemberAccess]
            pipelines[-1],
            batch.caption,
            num_inference_steps=num_inference_steps,
            latents=batch.rollout_noise,
            height=batch.pixel_values.shape[-2],
            width=batch.pixel_values.shape[-1],
            use_resolution_binning=False,
            clean_caption=False,
            output_type="latent",
            return_dict=False,
        )[0]
        vae = trainer.model.vae
        generated = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
    loss_color = color_distribution_loss(generated, batch.pixel_values)
    (loss + loss_color / num_inference_steps).backward()
    trainer.update()
    return loss.item(), loss_color.item()


def make_pipelines(trainer: Trainer, folder: Path) -> list[Any]:
    """Two pipelines from their folder around the trained networks: two more VAEs, tokenizers and schedulers."""
    pipelines = []
    for _ in range(2):
        pipeline = PixArtAlphaPipeline.from_pretrained(
            folder,
            transformer=trainer.model.transformer.get_base_model(),
            text_encoder=trainer.model.text_encoder.get_base_model(),
            torch_dtype=trainer.dtype,
        ).to(trainer.model.vae.device)
        pipeline.set_progress_bar_config(disable=True)
        pipelines.append(pipeline)
    return pipelines


def _noise_loss(trainer: Trainer, batch: Batch) -> Tensor:
    model = trainer.model
    with torch.no_grad():
        posterior = model.vae.encode(batch.pixel_values.to(model.vae.dtype)).latent_dist
    clean = (posterior.mean + posterior.std * batch.posterior_noise) * model.vae.config.scaling_factor
    noisy = trainer.noise_scheduler.add_noise(clean, batch.noise, batch.timesteps)
    tokens = model.tokenizer(
        batch.caption, padding="max_length", max_length=120, truncation=True, return_tensors="pt"
    ).to(model.vae.device)
    prediction = model.transformer(
        noisy.to(trainer.dtype),
        encoder_hidden_states=model.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0],
        encoder_attention_mask=tokens.attention_mask,
        timestep=batch.timesteps,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample
    return noise_prediction_loss(prediction, batch.noise)
