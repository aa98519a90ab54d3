"""The losses against closed forms and plain loops."""

import math

import pytest
import torch

from medart_core.objectives import (
    ROLLOUTS,
    chroma,
    color_distribution_loss,
    color_energy_loss,
    color_report,
    color_statistics,
    noise_prediction_loss,
)


def test_color_loss_is_the_formula_of_the_paper():
    generated, real = torch.randn(3, 3, 5, 7), torch.randn(3, 3, 4, 4)
    expected = 0.0
    for x, y in zip(generated.double(), real.double(), strict=True):
        for channel in range(3):
            a, b = x[channel].flatten(), y[channel].flatten()
            std_a = ((a - a.mean()).square().sum() / (len(a) - 1)).sqrt()
            std_b = ((b - b.mean()).square().sum() / (len(b) - 1)).sqrt()
            expected += ((a.mean() - b.mean()) ** 2 + (std_a - std_b) ** 2).item() / 3
    assert color_distribution_loss(generated, real).item() == pytest.approx(expected, rel=1e-5)


def test_color_loss_of_a_shift_is_three_times_its_square():
    real = torch.rand(2, 3, 8, 8) * 2 - 1
    assert color_distribution_loss(real + 0.5, real).item() == pytest.approx(0.75, rel=1e-5)
    assert color_distribution_loss(real, real).item() == 0


def test_color_loss_is_computed_in_fp32_and_sees_unclamped_pixels():
    real = torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16)
    loss = color_distribution_loss(torch.full((1, 3, 4, 4), 3.0, dtype=torch.bfloat16), real)
    assert loss.dtype == torch.float32 and loss.item() == 27


def test_color_loss_pairs_image_i_with_image_i():
    pair = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    assert color_distribution_loss(pair, pair).item() == 0
    assert color_distribution_loss(pair.flip(0), pair).item() == pytest.approx(3)


def test_without_masks_the_loss_is_the_plain_one_bit_for_bit():
    generated, real = torch.randn(2, 3, 9, 7), torch.randn(2, 3, 8, 8)
    a, b = generated.flatten(2), real.flatten(2)
    plain = ((a.mean(dim=2) - b.mean(dim=2)).square() + (a.std(dim=2) - b.std(dim=2)).square()).sum(dim=1).mean()
    assert torch.equal(color_distribution_loss(generated, real), plain)


def test_masked_loss_and_gradient_are_those_of_the_cropped_content():
    """A different rectangle counts in each image; nothing outside it has a gradient."""
    generated, real = torch.randn(2, 3, 12, 10, requires_grad=True), torch.randn(2, 3, 8, 8)
    real_mask = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    real_mask[:, :, 1:7, 2:8] = True
    mask = torch.zeros(2, 1, 12, 10, dtype=torch.bool)
    crops = [(slice(2, 9), slice(1, 8)), (slice(0, 12), slice(3, 10))]
    for index, (rows, columns) in enumerate(crops):
        mask[index, :, rows, columns] = True
    masked = color_distribution_loss(generated, real, mask, real_mask)
    [gradient] = torch.autograd.grad(masked, generated)
    cropped = [
        color_distribution_loss(generated[[index], :, rows, columns], real[[index], :, 1:7, 2:8])
        for index, (rows, columns) in enumerate(crops)
    ]
    assert masked.item() == pytest.approx(torch.stack(cropped).mean().item(), rel=1e-6)
    [expected] = torch.autograd.grad(torch.stack(cropped).mean(), generated)
    torch.testing.assert_close(gradient, expected)
    assert gradient.masked_select(~mask).count_nonzero() == 0 < gradient.count_nonzero()


def test_a_single_colour_within_the_mask_has_a_finite_gradient():
    flat = torch.zeros(1, 3, 4, 4, requires_grad=True)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    color_distribution_loss(flat, torch.rand(1, 3, 4, 4), mask, mask).backward()
    assert flat.grad is not None and flat.grad.isfinite().all()


def flat_red(values):
    """(N,) -> images (N, 3, 1, 2) of one colour each: its red is the value, the other channels are 0."""
    images = torch.zeros(len(values), 3, 1, 2, dtype=values.dtype)
    images[:, 0] = values.view(-1, 1, 1)
    return images


@pytest.mark.parametrize(("shift", "spread"), [(0.0, 0.3), (0.2, 0.1), (-0.5, 0.6), (0.4, 0.0)])
def test_energy_loss_is_that_of_two_normal_distributions(shift, spread):
    """E|X - Y| of normal variables is that of a folded normal one, E|X - X'| is 2 sigma / sqrt(pi)."""
    generator, count, real_spread = torch.Generator().manual_seed(0), 200_000, 0.3
    red = shift + spread * torch.randn(2 * count, generator=generator)
    loss = color_energy_loss(flat_red(red), flat_red(real_spread * torch.randn(count, generator=generator)))
    both = math.hypot(spread, real_spread)
    across = both * math.sqrt(2 / math.pi) * math.exp(-(shift**2) / (2 * both**2))
    across += shift * math.erf(shift / (both * math.sqrt(2)))
    assert loss.item() == pytest.approx(across - spread / math.sqrt(math.pi), abs=5e-3)


def test_energy_loss_takes_means_and_stds_as_one_vector():
    generated, real = torch.randn(4, 3, 5, 7), torch.randn(2, 3, 4, 4)
    x, y = ([torch.cat([image.mean((1, 2)), image.flatten(1).std(1)]) for image in side] for side in (generated, real))
    expected = 0.0
    for one, other, target in zip(x[0::2], x[1::2], y, strict=True):
        expected += ((one - target).norm() + (other - target).norm() - (one - other).norm()).item() / 2
    assert color_energy_loss(generated, real).item() == pytest.approx(expected / 2, rel=1e-5)


def test_the_paper_loss_shrinks_the_spread_of_colours_and_the_energy_loss_finds_the_real_one():
    """A generator of one Gaussian colour, fitted by each loss to colours of mean 0.2 and deviation 0.3."""
    found = {}
    for name, loss in (("paper", color_distribution_loss), ("unbiased", color_energy_loss)):
        generator = torch.Generator().manual_seed(0)
        parameters = torch.tensor([0.0, 0.15], requires_grad=True)
        optimizer = torch.optim.Adam([parameters], lr=0.01)
        for _ in range(150):
            real = 0.2 + 0.3 * torch.randn(256, generator=generator)
            noise = torch.randn(256 * ROLLOUTS[name], generator=generator)
            images = flat_red(parameters[0] + parameters[1] * noise)
            statistic = loss(images, flat_red(real))
            optimizer.zero_grad()
            statistic.backward()
            optimizer.step()
        found[name] = parameters.tolist()
    assert found["unbiased"] == pytest.approx([0.2, 0.3], abs=0.04)
    assert found["paper"] == pytest.approx([0.2, 0.0], abs=0.04)


def test_energy_loss_of_equal_images_is_zero_with_a_finite_gradient():
    real = torch.rand(2, 3, 8, 8)
    generated = real.repeat_interleave(2, dim=0).requires_grad_()
    loss = color_energy_loss(generated, real)
    loss.backward()
    assert loss.item() == 0 and generated.grad is not None and generated.grad.isfinite().all()


def test_masked_energy_loss_is_that_of_the_cropped_content():
    generated, real = torch.randn(4, 3, 12, 10), torch.randn(2, 3, 8, 8)
    mask, real_mask = torch.zeros(4, 1, 12, 10, dtype=torch.bool), torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    mask[..., 2:9, 1:8], real_mask[..., 1:7, 2:8] = True, True
    masked = color_energy_loss(generated, real, mask, real_mask)
    assert masked.item() == pytest.approx(color_energy_loss(generated[..., 2:9, 1:8], real[..., 1:7, 2:8]).item())


def test_noise_loss_drops_the_learned_sigma():
    noise, wild = torch.randn(2, 4, 3, 3), torch.full((2, 4, 3, 3), 1e3)
    assert noise_prediction_loss(torch.cat([noise + 1, wild], dim=1), noise).item() == pytest.approx(1, rel=1e-5)


def test_chroma_of_grey_is_zero_and_of_red_is_the_range():
    red = torch.full((1, 3, 2, 2), -1.0)
    red[:, 0] = 1
    assert chroma(torch.full((1, 3, 2, 2), 0.3)).item() == 0
    assert chroma(red).item() == 2


def test_color_report_names_every_statistic_of_both_sides():
    report = color_report(torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4))
    assert len(report) == 12 and {"generated_mean_r", "real_std_b"} <= report.keys()


def test_color_report_counts_the_masked_pixels_and_keeps_no_graph():
    pixels, mask = torch.randn(1, 3, 4, 4, requires_grad=True), torch.rand(1, 1, 4, 4) < 0.5
    mask[..., 0] = True
    report = color_report(pixels, pixels, None, mask)
    mean, _ = color_statistics(pixels, mask)
    assert report["real_mean_g"].item() == mean[0, 1].item() != report["generated_mean_g"].item()
    assert not any(value.requires_grad for value in report.values())
