"""From classes to pictures with DiT: every image depends on its own class, the seed and its number only."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from diffusers_grad import decode_latents
from medart_core import sampling, seeds
from medart_core.errors import UserError
from medart_core.gaussian_diffusion import BETA_END, BETA_START, NUM_TIMESTEPS, cumulative_alphas, spaced_timesteps

SAMPLERS = ("ddpm", "ddim", "dpm++")
NOISE_STREAM, LABEL_STREAM = 1, 2
IMAGENET_LABELS = [207, 360, 387, 974, 88, 979, 417, 279]  # those that DiT's users know


def make_scheduler(sampler: str, num_steps: int) -> Any:
    """The official scheduler of a sampler, set to `num_steps` steps.

    `ddpm` is ancestral sampling with learned variances. `ddim` is the first order of DPM-Solver++, which is the same:
    diffusers' DDIMScheduler goes 1000 // num_steps back in each step, wherever the next of the timesteps is.
    """
    schedule: dict[str, Any] = {"num_train_timesteps": NUM_TIMESTEPS, "beta_start": BETA_START, "beta_end": BETA_END}
    if sampler == "ddpm":
        scheduler: Any = DDPMScheduler(**schedule, variance_type="learned_range", clip_sample=False)
    elif sampler in SAMPLERS:
        scheduler = DPMSolverMultistepScheduler(**schedule, solver_order=1 if sampler == "ddim" else 2)
    else:
        raise UserError(f"the sampler {sampler!r} does not exist; choose from {', '.join(SAMPLERS)}")
    if not 2 <= num_steps <= NUM_TIMESTEPS:
        raise UserError(f"{num_steps} sampling steps are not possible; choose 2 to {NUM_TIMESTEPS}")
    # The schedulers' own product is in fp32, in which the small betas lose three digits.
    scheduler.alphas_cumprod = cumulative_alphas()
    if sampler == "dpm++":
        scheduler.set_timesteps(num_steps)
    else:
        scheduler.set_timesteps(timesteps=spaced_timesteps(num_steps)[::-1])
    return scheduler


@torch.no_grad()
def sample_latents(
    model: Any,
    labels: Tensor,
    generators: list[torch.Generator],
    *,
    sampler: str = "ddpm",
    num_steps: int = 250,
    cfg_scale: float = 4.0,
    guided_channels: int = 3,
) -> Tensor:
    """Latents (B, C, h, w) fp32 of a DiT for labels (B,); row i takes all its noise from generator i, on the CPU."""
    device = labels.device
    scheduler = make_scheduler(sampler, num_steps)
    shape = (1, model.in_channels, model.input_size, model.input_size)
    x = torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(device)
    both = torch.cat([labels, torch.full_like(labels, model.num_classes)])
    for t in scheduler.timesteps.tolist():
        times = torch.full((len(both),), t, device=device)
        if cfg_scale == 1:
            out = model(x, times[: len(x)], labels).float()
        else:
            out = model.forward_with_cfg(torch.cat([x, x]), times, both, cfg_scale, guided_channels)[: len(x)]
        if sampler != "ddpm":
            out = out[:, : model.in_channels]
        x = scheduler.step(out, t, x, generator=generators, return_dict=False)[0]
    return x


def sample_images(
    model: Any, vae: Any, labels: Sequence[int], numbers: Sequence[int], *, seed: int, batch_size: int, **sampler: Any
) -> Iterator[Tensor]:
    """Yield one (H, W, 3) uint8 image for each pair of class and number, in order.

    Args:
        model: a DiT in evaluation mode, on the device and in the dtype to compute in.
        numbers: what tells images of one seed apart; an image's noise depends on the seed and its number only.
        batch_size: images that go through the network at a time, the last group padded: to keep every bit, keep it.
        sampler: of `sample_latents`: sampler, num_steps, cfg_scale, guided_channels.
    """
    device = next(model.parameters()).device
    for rows in sampling.groups(len(labels), batch_size):
        filled = sampling.padded(rows, batch_size)
        noises = [seeds.generator(seed, NOISE_STREAM, numbers[row]) for row in filled]
        latents = sample_latents(
            model, torch.tensor([labels[row] for row in filled], device=device), noises, **sampler
        )
        for latent in latents[: len(rows)].split(1):
            with torch.autocast(device.type, enabled=False):  # of a training in 16 bits
                pixels = decode_latents(vae, latent)
            yield sampling.to_uint8(pixels)[0]


def choose_labels(asked: Sequence[str], num_classes: int, class_names: Sequence[str] = ()) -> list[int]:
    """Classes from their numbers or names; with none asked for the eight usual ones of ImageNet, else the first eight.

    Raises:
        UserError: for a class that does not exist.
    """
    if not asked:
        return IMAGENET_LABELS if num_classes == 1000 else [*range(min(8, num_classes))]
    numbers = {name.casefold(): number for number, name in enumerate(class_names)}
    labels = []
    for label in asked:
        number = numbers.get(label.strip().casefold(), int(label) if label.strip().isdecimal() else -1)
        if not 0 <= number < num_classes:
            named = f" or a name: {', '.join(class_names[:10])}" if class_names else ""
            raise UserError(f"there is no class {label!r}; give a number from 0 to {num_classes - 1}{named}")
        labels.append(number)
    return labels


def draw_labels(count: int, num_classes: int, seed: int, balanced: bool) -> list[int]:
    """The classes of images 0 ... count - 1: drawn for each by its number, or in turn. More images change none."""
    if balanced:
        return [number % num_classes for number in range(count)]
    draws = torch.randint(num_classes, (count,), generator=seeds.generator(seed, LABEL_STREAM))
    return draws.tolist()
