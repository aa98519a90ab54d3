"""Med-Art's steps as medart.py takes them, with each of the levers that the benchmark pulls alone."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from thin_pixart import Batch, Trainer
from torch import Tensor

from diffusers_grad import decode_latents, sample_latents
from medart_core import lean_lora
from medart_core.latents import encode_moments
from medart_core.latents import sample_latents as sample_posterior
from medart_core.objectives import color_distribution_loss, noise_prediction_loss
from medart_core.text import encode_prompts, encode_with_negative


@dataclass(frozen=True)
class Work:
    """What a step does beside the model's own settings: the padded length of captions, where latents come from."""

    pad_to: int | None = 120  # None: to the longest caption
    cached_moments: bool = False
    gradient: str = "full"
    checkpoint_steps: bool = False
    one_text_call: bool = True
    merge_lora: bool = True


def ordinary_step(trainer: Trainer, batch: Batch, work: Work) -> tuple[Tensor]:
    """One optimiser step on the noise-prediction loss, which is returned."""
    loss = _noise_backward(trainer, batch, work)
    trainer.update()
    return (loss,)


def hldf_step(trainer: Trainer, batch: Batch, work: Work, num_inference_steps: int) -> tuple[Tensor, Tensor]:
    """One optimiser step on the noise-prediction loss and the colour loss, which are returned."""
    loss, model = _noise_backward(trainer, batch, work), trainer.model
    with lean_lora.merged(model.transformer) if work.merge_lora else nullcontext():
        with trainer.autocast():
            latents = sample_latents(
                model.transformer,
                model.scheduler,
                batch.rollout_noise,
                *_encode_both(trainer, batch, work),
                num_inference_steps=num_inference_steps,
                gradient=work.gradient,
                k=min(5, num_inference_steps),
                checkpoint_steps=work.checkpoint_steps,
                generator=torch.Generator().manual_seed(0),
            )
            generated = decode_latents(model.vae, latents, checkpointing=work.checkpoint_steps)
        loss_color = color_distribution_loss(generated, batch.pixel_values)
        (loss_color / num_inference_steps).backward()
    trainer.update()
    return loss, loss_color.detach()


def _noise_backward(trainer: Trainer, batch: Batch, work: Work) -> Tensor:
    model = trainer.model
    with trainer.autocast():
        moments = batch.moments if work.cached_moments else encode_moments(model.vae, batch.pixel_values)
        clean = sample_posterior(model.vae, moments, batch.posterior_noise)
        prompt_embeds, mask = encode_prompts(model.tokenizer, model.text_encoder, [batch.caption], pad_to=work.pad_to)
        prediction = model.transformer(
            trainer.noise_scheduler.add_noise(clean, batch.noise, batch.timesteps),
            encoder_hidden_states=prompt_embeds,
            encoder_attention_mask=mask,
            timestep=batch.timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        loss = noise_prediction_loss(prediction, batch.noise)
    loss.backward()
    return loss.detach()


def _encode_both(trainer: Trainer, batch: Batch, work: Work) -> tuple[Tensor, ...]:
    model = trainer.model
    parts = model.tokenizer, model.text_encoder
    if work.one_text_call:
        return encode_with_negative(*parts, [batch.caption], pad_to=work.pad_to)
    return *encode_prompts(*parts, [batch.caption], pad_to=work.pad_to), *encode_prompts(
        *parts, [""], pad_to=work.pad_to
    )
