"""The losses: tensors in, tensors out."""

import torch
from torch import Tensor
from torch.nn import functional as F


def noise_prediction_loss(prediction: Tensor, noise: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error between predicted and true noise in fp32; a learned-sigma half is dropped.

    Args:
        prediction: (B, 4 or 8, h, w), the transformer's output.
        noise: (B, 4, h, w).
        weights: (B,) factors of the images' errors, all 1 by default.
    """
    prediction = prediction[:, : noise.shape[1]].float()
    if weights is None:
        return F.mse_loss(prediction, noise.float())
    return ((prediction - noise.float()).square().mean(dim=(1, 2, 3)) * weights).mean()


def min_snr_weights(alphas_cumprod: Tensor, timesteps: Tensor, gamma: float) -> Tensor:
    """Weights min(SNR, gamma) / SNR of a noise-predicting model: (B,) in (0, 1] (arXiv:2303.09556, section 3.4).

    Args:
        alphas_cumprod: (T,), the noise schedule; SNR(t) = alphas_cumprod[t] / (1 - alphas_cumprod[t]).
        timesteps: (B,) int64 in [0, T).
    """
    alpha_bar = alphas_cumprod.to(timesteps.device)[timesteps].float()
    snr = alpha_bar / (1 - alpha_bar)
    return snr.clamp(max=gamma) / snr


def color_statistics(pixels: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of each colour channel over the pixels, in fp32: two (B, 3).

    Args:
        pixels: (B, 3, H, W).
        mask: (B, 1, H, W) bool, the pixels that count, at least two of an image; all by default.
    """
    flat = pixels.float().flatten(2)
    if mask is None:
        return flat.mean(dim=2), flat.std(dim=2)
    kept = [image[:, keep] for image, keep in zip(flat, mask.flatten(1), strict=True)]
    return torch.stack([image.mean(dim=1) for image in kept]), torch.stack([image.std(dim=1) for image in kept])


def color_distribution_loss(
    generated: Tensor, real: Tensor, generated_mask: Tensor | None = None, real_mask: Tensor | None = None
) -> Tensor:
    """Squared distance of the per-channel means and standard deviations, summed over channels, mean over images.

    L_color of Med-Art (arXiv:2506.20449): image i of `generated` is held against image i of `real`.

    Args:
        generated: (B, 3, H, W) in about [-1, 1], not clamped.
        real: (B, 3, H', W') in [-1, 1].
        generated_mask, real_mask: (B, 1, H, W) and (B, 1, H', W') bool, the pixels that count; all by default.
    """
    generated_mean, generated_std = color_statistics(generated, generated_mask)
    real_mean, real_std = color_statistics(real, real_mask)
    per_channel = (generated_mean - real_mean).square() + (generated_std - real_std).square()
    return per_channel.sum(dim=1).mean()


def color_energy_loss(
    generated: Tensor, real: Tensor, generated_mask: Tensor | None = None, real_mask: Tensor | None = None
) -> Tensor:
    """Energy distance of the colour statistics of generated and real images, estimated from two rollouts per prompt.

    L_color of Med-Art is an expectation of squares. Of an image's statistics s = (means, standard deviations) in R^6,
    with independent X of a generated and Y of a real image of the same prompt,

        E |X - Y|^2 = |E X - E Y|^2 + tr Var X + tr Var Y,

    so that it is least where all images of a prompt have one colour (Var X = 0). A second rollout X' pays the spread
    back, E |X - X'|^2 = 2 tr Var X, and with distances in place of their squares what is left is

        E |X - Y| - E |X - X'| / 2  =  D / 2 + E |Y - Y'| / 2,

    where D = 2 E |X - Y| - E |X - X'| - E |Y - Y'| is the energy distance: at least 0, and 0 only if X and Y have the
    same distribution, its spread included (G. J. Szekely and M. L. Rizzo, J. Stat. Plan. Inference 143, 2013). The
    last term does not depend on the model. Every expectation is over one draw of each, so that

        (|x1 - y| + |x2 - y| - |x1 - x2|) / 2

    and its gradient have no bias, whatever the number of images; by the triangle inequality it is never below 0. It is
    in pixel values: an error e pulls with 1, where the squared loss pulls with 2 e.

    Args:
        generated: (2 B, 3, H, W): images 2 i and 2 i + 1 are two rollouts of the prompt of `real[i]`.
        real: (B, 3, H', W') in [-1, 1].
        generated_mask, real_mask: (2 B, 1, H, W) and (B, 1, H', W') bool, the pixels that count; all by default.
    """
    rollouts = torch.cat(color_statistics(generated, generated_mask), dim=1)
    one, other = rollouts[0::2], rollouts[1::2]  # (B, 6) each
    target = torch.cat(color_statistics(real, real_mask), dim=1)
    sides = [torch.linalg.vector_norm(a - b, dim=1) for a, b in ((one, target), (other, target), (one, other))]
    return (sides[0] + sides[1] - sides[2]).mean() / 2


COLOR_LOSSES = {"paper": color_distribution_loss, "unbiased": color_energy_loss}
ROLLOUTS = {"paper": 1, "unbiased": 2}  # images that are sampled per prompt


def chroma(pixels: Tensor) -> Tensor:
    """Mean over pixels of the colourfulness max(R, G, B) - min(R, G, B), in units of [-1, 1] pixels: (B,)."""
    values = pixels.float().clamp(-1, 1)
    return (values.amax(dim=1) - values.amin(dim=1)).mean(dim=(1, 2))


@torch.no_grad()
def color_report(
    generated: Tensor, real: Tensor, generated_mask: Tensor | None = None, real_mask: Tensor | None = None
) -> dict[str, Tensor]:
    """What a log keeps of one colour comparison: mean and std per channel of both sides, averaged over images."""
    report = {}
    for side, pixels, mask in (("generated", generated, generated_mask), ("real", real, real_mask)):
        for statistic, values in zip(("mean", "std"), color_statistics(pixels, mask), strict=True):
            for channel, value in zip("rgb", values.mean(dim=0), strict=True):
                report[f"{side}_{statistic}_{channel}"] = value
    return report
