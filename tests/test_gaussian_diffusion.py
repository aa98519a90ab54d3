"""DiT's schedule and loss against closed forms and independent float64 code."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from medart_core.gaussian_diffusion import GaussianDiffusion, cumulative_alphas, spaced_timesteps
from medart_core.objectives import diffusion_loss, discretized_log_likelihood

T = torch.tensor([0, 1, 500, 999])

# torch remembers its constructors at their first use under a device. If that is inside transformers' loading, which
# replaces torch.linspace meanwhile, torch.linspace stays on the CPU from then on: so it is here, before any test.
with torch.device("meta"):
    torch.empty(0)


def batch() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x_start, noise = torch.randn(2, 4, 4, 8, 8, generator=generator)
    x_start[:, 0] *= 3  # some beyond [-1, 1], where the outermost bins are
    prediction = torch.cat([noise, torch.zeros_like(noise)], dim=1) + torch.randn(4, 8, 8, 8, generator=generator) / 2
    return x_start, noise, prediction


def textbook_loss(x_start, noise, prediction, t) -> float:
    """The same loss from the papers' formulas with explicit means, one image, in float64 numpy."""
    betas = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.cumprod(1 - betas)
    before = np.append(1.0, alpha_bar[:-1])
    variances = betas * (1 - before) / (1 - alpha_bar)
    eps, values = prediction[:4], prediction[4:]
    x_t = np.sqrt(alpha_bar[t]) * x_start + np.sqrt(1 - alpha_bar[t]) * noise

    def mean(x0):
        from_start = np.sqrt(before[t]) * betas[t] / (1 - alpha_bar[t])
        return from_start * x0 + np.sqrt(1 - betas[t]) * (1 - before[t]) / (1 - alpha_bar[t]) * x_t

    predicted_start = (x_t - np.sqrt(1 - alpha_bar[t]) * eps) / np.sqrt(alpha_bar[t])
    true_variance = variances[max(t, 1)]
    variance = betas[t] ** ((values + 1) / 2) * true_variance ** ((1 - values) / 2)
    if t:
        gap = np.square(mean(x_start) - mean(predicted_start))
        nats = 0.5 * np.log(variance / true_variance) + (true_variance + gap) / (2 * variance) - 0.5
    else:

        def cdf(x):
            z = (x - mean(predicted_start)) / np.sqrt(variance)
            return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))

        upper = np.where(x_start > 0.999, 1.0, cdf(x_start + 1 / 255))
        lower = np.where(x_start < -0.999, 0.0, cdf(x_start - 1 / 255))
        nats = -np.log(np.clip(upper - lower, 1e-12, None))
    return float(np.mean(np.square(eps - noise)) + np.mean(nats) / math.log(2))


def test_loss_is_the_papers():
    x_start, noise, prediction = batch()
    ours = diffusion_loss(lambda *_: prediction, GaussianDiffusion(), x_start, T, T, noise)
    arrays = [tensor.double().numpy() for tensor in (x_start, noise, prediction)]
    for n, t in enumerate(T.tolist()):
        assert ours[n].item() == pytest.approx(textbook_loss(*(array[n] for array in arrays), t=t), rel=2e-5)


def test_the_model_sees_noisy_latents_and_dropped_labels():
    x_start, noise, prediction = batch()
    y, drop = torch.arange(4), torch.tensor([True, False, False, True])
    seen = []
    diffusion_loss(lambda *given: seen.extend(given) or prediction, GaussianDiffusion(), x_start, T, y, noise, drop)
    alpha_bar = cumulative_alphas()[T].float()[:, None, None, None]
    torch.testing.assert_close(seen[0], alpha_bar.sqrt() * x_start + (1 - alpha_bar).sqrt() * noise)
    assert seen[1] is T and seen[2] is y and seen[3] is drop


def test_the_bound_trains_the_variances_only():
    x_start, noise, prediction = batch()
    prediction.requires_grad_()
    diffusion_loss(lambda *_: prediction, GaussianDiffusion(), x_start, T, T, noise).sum().backward()
    assert prediction.grad is not None
    mse_only = 2 * (prediction[:, :4] - noise) / noise[0].numel()
    torch.testing.assert_close(prediction.grad[:, :4], mse_only)
    assert prediction.grad[:, 4:].abs().amin(dim=(1, 2, 3)).gt(0).all()  # in every image, t = 0 included


def test_a_perfect_prediction_costs_nothing_above_t_0():
    x_start, noise, _ = batch()
    perfect = torch.cat([noise, -torch.ones_like(noise)], dim=1)  # -1: the true posterior's variance
    loss = diffusion_loss(lambda *_: perfect, GaussianDiffusion(), x_start, T, T, noise)
    assert loss[1:].abs().max() < 1e-6 < loss[0]


def test_grey_levels_are_all_there_is():
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, std in ((0.3, 0.2), (-1.2, 1.0), (0.6, 0.02)):
        log = discretized_log_likelihood(levels, levels - mean, torch.tensor(math.log(std), dtype=torch.float64))
        assert log.exp().sum().item() == pytest.approx(1, abs=1e-6)
        level = levels[200].item()
        normal = NormalDist(mean, std)
        exact = normal.cdf(level + 1 / 255) - normal.cdf(level - 1 / 255)
        assert log[200].exp().item() == pytest.approx(exact, rel=0.02)


def test_schedule():
    alpha_bar = cumulative_alphas()
    assert [alpha_bar[t].item() for t in (0, 499, 999)] == pytest.approx([0.9999, 0.0786, 4.036e-5], rel=1e-3)
    betas = np.linspace(1e-4, 0.02, 1000)
    assert np.allclose(alpha_bar, [math.exp(math.fsum(np.log1p(-betas[: t + 1]))) for t in range(1000)], rtol=1e-12)
    diffusion = GaussianDiffusion()
    assert not diffusion.state_dict()
    np.testing.assert_allclose(diffusion.log_max_variance, np.log(betas), rtol=1e-6)
    torch.testing.assert_close(diffusion.signal_rate.square() + diffusion.noise_rate.square(), torch.ones(1000))
    assert (diffusion.log_min_variance <= diffusion.log_max_variance).all()
    middle = diffusion.log_variance(torch.zeros(1, 1, 1, 1), torch.tensor([500]))
    assert middle.item() == pytest.approx(
        (diffusion.log_max_variance[500] + diffusion.log_min_variance[500]).item() / 2
    )


def test_spacing_of_250_steps():
    steps = spaced_timesteps(250)
    assert steps[:3] == [0, 4, 8] and steps[-2:] == [995, 999]
    assert len(set(steps)) == 250
    assert steps == [(2 * 999 * n + 249) // (2 * 249) for n in range(250)]  # no tie: 83 is odd
    assert spaced_timesteps(1000) == [*range(1000)]


def test_a_step_reads_nothing_back():
    """On the meta device a value that the host waits for, or a table that lies elsewhere, is an error."""
    from models import DiT

    with torch.device("meta"):
        model = DiT(input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=3)
        diffusion = GaussianDiffusion()
        x, t = torch.randn(2, 4, 8, 8), torch.randint(1000, (2,))
        loss = diffusion_loss(model, diffusion, x, t, torch.randint(3, (2,)), torch.randn(2, 4, 8, 8))
        loss.mean().backward()
    assert loss.shape == (2,) and loss.device.type == "meta"
