"""Sampling from DiT: the samplers against independent float64 code, guidance, and what an image depends on."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from torch import nn

from medart_core import seeds
from medart_core.dit_sampling import (
    IMAGENET_LABELS,
    NOISE_STREAM,
    choose_labels,
    draw_labels,
    make_scheduler,
    sample_images,
    sample_latents,
)
from medart_core.errors import UserError
from medart_core.gaussian_diffusion import cumulative_alphas, spaced_timesteps
from medart_core.sampling import to_uint8
from models import DiT


def generators(count: int = 2) -> list[torch.Generator]:
    return [seeds.generator(5, NOISE_STREAM, number) for number in range(count)]


class Gaussian:
    """The exact noise prediction for data of standard deviation 0.5; variances that change with place and time."""

    in_channels, input_size, num_classes, std = 4, 8, 3, 0.5

    def __call__(self, x, t, y):
        alpha_bar = cumulative_alphas()[t].to(x.dtype)[:, None, None, None]
        eps = x * (1 - alpha_bar).sqrt() / (alpha_bar * self.std**2 + 1 - alpha_bar)
        return torch.cat([eps, torch.sin(3 * x + t[:, None, None, None] / 100)], dim=1)


def ancestral(num_steps: int) -> torch.Tensor:
    """DDPM with learned variances over respaced steps from the papers' formulas, in float64."""
    steps = spaced_timesteps(num_steps)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[steps]
    before = np.append(1.0, alpha_bar[:-1])
    betas = 1 - alpha_bar / before
    variances = betas * (1 - before) / (1 - alpha_bar)
    noises = generators()
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=noise) for noise in noises]).double()
    for n in reversed(range(num_steps)):
        eps, values = Gaussian()(x, torch.full((2,), steps[n]), None).chunk(2, dim=1)
        x0 = (x - np.sqrt(1 - alpha_bar[n]) * eps) / np.sqrt(alpha_bar[n])
        x = np.sqrt(before[n]) * betas[n] / (1 - alpha_bar[n]) * x0 + (
            np.sqrt(1 - betas[n]) * (1 - before[n]) / (1 - alpha_bar[n]) * x
        )
        if n:
            log_variance = (values + 1) / 2 * np.log(betas[n]) + (1 - values) / 2 * np.log(variances[n])
            draws = torch.cat([torch.randn(1, 4, 8, 8, generator=noise) for noise in noises])
            x = x + (log_variance / 2).exp() * draws
    return x


@pytest.mark.parametrize("num_steps", [20, 250])
def test_ddpm_is_ancestral_sampling_with_learned_variances(num_steps):
    ours = sample_latents(Gaussian(), torch.zeros(2).long(), generators(), num_steps=num_steps, cfg_scale=1)
    torch.testing.assert_close(ours.double(), ancestral(num_steps), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("num_steps", [20, 250])
def test_ddim(num_steps):
    ours = sample_latents(
        Gaussian(), torch.zeros(2).long(), generators(), sampler="ddim", num_steps=num_steps, cfg_scale=1
    )
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in generators()]).double()
    alpha_bar = cumulative_alphas()[spaced_timesteps(num_steps)]
    for n in reversed(range(num_steps)):
        eps = Gaussian()(x, torch.full((2,), spaced_timesteps(num_steps)[n]), None)[:, :4]
        x0 = (x - (1 - alpha_bar[n]).sqrt() * eps) / alpha_bar[n].sqrt()
        before = alpha_bar[n - 1] if n else torch.tensor(1.0)
        x = before.sqrt() * x0 + (1 - before).sqrt() * eps
    torch.testing.assert_close(ours.double(), x, rtol=1e-5, atol=2e-5)


def test_why_ddim_is_not_diffusers_own():
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, timestep_spacing="linspace", clip_sample=False)
    scheduler.set_timesteps(250)
    assert scheduler.timesteps.tolist() == spaced_timesteps(250)[::-1]
    x = torch.ones(1, 4, 8, 8)
    alpha_bar = scheduler.alphas_cumprod.double()
    errors = []
    for t, after in zip(scheduler.timesteps.tolist(), scheduler.timesteps.tolist()[1:], strict=False):
        start = (x - (1 - alpha_bar[t]).sqrt() * x) / alpha_bar[t].sqrt()
        for target in (after, t - 4):
            right = alpha_bar[target].sqrt() * start + (1 - alpha_bar[target]).sqrt() * x
            errors.append((scheduler.step(x, t, x, return_dict=False)[0] - right).abs().max().item())
    assert max(errors[0::2]) > 1e-3  # of a step to the next timestep, which is 4 or 5 away
    assert max(errors[1::2]) < 1e-6  # of a step to t - 4, as it always goes


@pytest.mark.parametrize(
    ("sampler", "num_steps", "tolerance"), [("dpm++", 20, 0.05), ("dpm++", 50, 0.004), ("ddim", 250, 0.02)]
)
def test_the_ode_is_solved(sampler, num_steps, tolerance):
    """For Gaussian data the probability-flow ODE only scales the first noise, by a known factor."""
    ours = sample_latents(
        Gaussian(), torch.zeros(2).long(), generators(), sampler=sampler, num_steps=num_steps, cfg_scale=1
    )
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in generators()])
    last = cumulative_alphas()[-1].item()
    exact = noise * Gaussian.std / (last * Gaussian.std**2 + 1 - last) ** 0.5
    assert (ours - exact).norm() / exact.norm() < tolerance


@pytest.mark.parametrize(("sampler", "num_steps"), [("euler", 20), ("ddpm", 1), ("dpm++", 1001)])
def test_what_does_not_exist_is_refused(sampler, num_steps):
    with pytest.raises(UserError, match="choose"):
        make_scheduler(sampler, num_steps)


@pytest.fixture(scope="module")
def model() -> DiT:
    torch.manual_seed(0)
    model = DiT(input_size=4, hidden_size=32, depth=2, num_heads=2, num_classes=10).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def vae(tiny_pixart: Path):
    return AutoencoderKL.from_pretrained(tiny_pixart, subfolder="vae")


def draw(model, vae, labels, numbers, **settings):
    settings = {"seed": 3, "batch_size": 2, "num_steps": 4, "cfg_scale": 4.0} | settings
    return [*sample_images(model, vae, labels, numbers, **settings)]


def test_an_image_depends_on_its_class_number_and_seed_only(model, vae):
    images = draw(model, vae, [1, 2, 3], [0, 1, 2])
    assert [tuple(image.shape) for image in images] == [(32, 32, 3)] * 3
    assert torch.equal(draw(model, vae, [3], [2])[0], images[2])
    assert torch.equal(draw(model, vae, [5, 2], [8, 1])[1], images[1])
    for other in (draw(model, vae, [4], [2]), draw(model, vae, [3], [3]), draw(model, vae, [3], [2], seed=4)):
        assert not torch.equal(other[0], images[2])
    for size in (1, 3):  # to one grey level: other kernels round otherwise
        for ours, theirs in zip(draw(model, vae, [1, 2, 3], [0, 1, 2], batch_size=size), images, strict=True):
            assert (ours.int() - theirs.int()).abs().max() <= 1


def test_guidance_is_that_of_the_model(model):
    labels = torch.tensor([1, 2])
    seen = []
    spy = SimpleNamespace(
        in_channels=4,
        input_size=4,
        num_classes=10,
        forward_with_cfg=lambda *given: seen.append(given) or model.forward_with_cfg(*given),
    )
    out = sample_latents(spy, labels, generators(), num_steps=2, cfg_scale=3.0, guided_channels=4)
    assert [given[1].tolist() for given in seen] == [[999] * 4, [0] * 4]
    assert seen[0][2].tolist() == [1, 2, 10, 10] and seen[0][3:] == (3.0, 4)
    assert not torch.equal(out, sample_latents(model, labels, generators(), num_steps=2, cfg_scale=3.0))
    plain = sample_latents(model, labels, generators(), num_steps=3, cfg_scale=1)
    near = sample_latents(model, labels, generators(), num_steps=3, cfg_scale=1 + 1e-9)  # not the plain branch
    torch.testing.assert_close(plain, near, rtol=1e-4, atol=1e-4)


def test_grey_levels_are_those_of_the_published_script():
    pixels = torch.linspace(-1.3, 1.3, 6001).expand(1, 3, 1, -1)
    published = (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    difference = to_uint8(pixels).int() - published.int()
    assert difference.abs().max() <= 1 and (difference != 0).float().mean() < 1e-3  # at exact halves only


def test_labels():
    assert choose_labels([], 1000) == IMAGENET_LABELS
    assert choose_labels([], 3) == [0, 1, 2]
    assert choose_labels(["2", "Viral pneumonia "], 3, ["normal", "viral pneumonia", "x"]) == [2, 1]
    for wrong in ("3", "-1", "dog"):
        with pytest.raises(UserError, match="0 to 2 or a name: normal"):
            choose_labels([wrong], 3, ["normal", "viral pneumonia", "x"])


def test_drawn_labels():
    labels = draw_labels(5000, 10, seed=0, balanced=False)
    assert labels[:70] == draw_labels(70, 10, seed=0, balanced=False)
    assert labels[:70] != draw_labels(70, 10, seed=1, balanced=False)
    assert np.bincount(labels).min() > 400
    assert np.bincount(draw_labels(20, 10, seed=0, balanced=True)).tolist() == [2] * 10
