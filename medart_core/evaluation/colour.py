"""Colour: what HLDF mends, measured per image so that every figure has an interval and a floor."""

import hashlib
import inspect

import numpy as np
import torch
from torch import Tensor

from medart_core.objectives import chroma, color_statistics

BINS = 64  # of a channel's histogram over [-1, 1]
STATISTICS, CHROMA, HISTOGRAMS = slice(0, 6), 6, slice(7, 7 + 3 * BINS)


class ColourExtractor:
    """Per image: mean and standard deviation of R, G and B, chroma, and three histograms, in [-1, 1] pixels."""

    name = f"colour statistics ({BINS} bins, no resizing)"
    num_features = HISTOGRAMS.stop

    def __init__(self) -> None:
        source = "".join(map(inspect.getsource, (ColourExtractor.__call__, color_statistics, chroma)))
        self.sha256 = hashlib.sha256(source.encode()).hexdigest()

    def __call__(self, images: Tensor, /) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 6 + 1 + 3 * BINS); the bins of a channel sum to 1."""
        pixels = images.float() / 127.5 - 1
        bins = images.flatten(2).long() * BINS // 256
        counts = torch.zeros(*bins.shape[:2], BINS).scatter_add_(2, bins, torch.ones(bins.shape))
        histograms = counts / bins.shape[2]
        return torch.cat([*color_statistics(pixels), chroma(pixels)[:, None], histograms.flatten(1)], dim=1)


def statistics_distance(generated: np.ndarray, real: np.ndarray) -> float:
    """Distance of the sets' average channel means and standard deviations, in [-1, 1] pixels."""
    return float(np.linalg.norm(generated[:, STATISTICS].mean(axis=0) - real[:, STATISTICS].mean(axis=0)))


def chroma_error(generated: np.ndarray, real: np.ndarray) -> float:
    """Absolute difference of the average chroma, in [-1, 1] pixels."""
    return abs(float(generated[:, CHROMA].mean() - real[:, CHROMA].mean()))


def histogram_distance(generated: np.ndarray, real: np.ndarray) -> float:
    """Earth mover's distance of the sets' channel histograms, mean over channels, in [-1, 1] pixels."""
    return float(np.abs(np.cumsum(histograms(generated) - histograms(real), axis=1)).sum(axis=1).mean() * 2 / BINS)


def diversity_ratio(generated: np.ndarray, real: np.ndarray) -> float:
    """Variance of the images' mean colours, summed over channels, generated over real: below 1 is less diverse."""
    ours, theirs = (side[:, :3].var(axis=0, ddof=1).sum(dtype=np.float64) for side in (generated, real))
    return float(ours / max(theirs, np.finfo(np.float64).tiny))


def histograms(features: np.ndarray) -> np.ndarray:
    """The average histograms of a set, (3, BINS)."""
    return features[:, HISTOGRAMS].mean(axis=0, dtype=np.float64).reshape(3, BINS)


FIGURES = {
    "colour_statistics_distance": statistics_distance,
    "chroma_error": chroma_error,
    "colour_histogram_distance": histogram_distance,
    "colour_diversity": diversity_ratio,
}
