"""Distances between two sets of feature vectors, in float64 on plain matrices.

Libraries have these too, but want images and streaming states (torchmetrics) or SciPy and scikit-learn (prdc); here
every figure is needed again for random halves of one feature matrix, which a page of NumPy does exactly.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BLOCK = 512  # vectors that are in memory in float64 at a time, and rows of a distance matrix
ROUNDING = 1e-12  # of |x|^2 + |y|^2: a squared distance below is 0, or copies would lie outside of each other's balls


# --- Frechet distance ---


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and unbiased covariance (D, D) of feature vectors (N, D), N at least 2."""
    mean = np.asarray(np.mean(features, axis=0, dtype=np.float64))
    products = np.zeros((features.shape[1], features.shape[1]))
    for start in range(0, len(features), BLOCK):
        centred = features[start : start + BLOCK] - mean
        products += centred.T @ centred
    return mean, products / (len(features) - 1)


class Gaussian(NamedTuple):
    """A mean (D,) and a factor F (r, D) of the covariance F^T F."""

    mean: np.ndarray
    factor: np.ndarray


def fit_gaussian(features: np.ndarray) -> Gaussian:
    """The Gaussian of feature vectors (N, D); for N up to D the factor is the centred matrix itself."""
    if len(features) > features.shape[1]:
        return gaussian(*moments(features))
    features = np.asarray(features, dtype=np.float64)
    mean = features.mean(axis=0)
    return Gaussian(mean, (features - mean) / np.sqrt(len(features) - 1))


def gaussian(mean: np.ndarray, cov: np.ndarray) -> Gaussian:
    """The Gaussian with these moments, (D,) and (D, D)."""
    values, vectors = np.linalg.eigh(np.asarray(cov, dtype=np.float64))
    return Gaussian(np.asarray(mean, dtype=np.float64), np.sqrt(values.clip(min=0))[:, None] * vectors.T)


def gaussian_distance(one: Gaussian, other: Gaussian) -> float:
    """|m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)), the Frechet distance of two Gaussians.

    With C = F^T F on both sides the trace of the root is the sum of the singular values of F1 F2^T: of few images no
    D x D matrix is ever formed, and N below D is as exact as any other.
    """
    root_trace = np.linalg.svd(one.factor @ other.factor.T, compute_uv=False).sum()
    traces = np.square(one.factor).sum() + np.square(other.factor).sum()
    return float(np.square(one.mean - other.mean).sum() + traces - 2 * root_trace)


def frechet_distance(generated: np.ndarray, real: np.ndarray) -> float:
    """Frechet distance of the Gaussians fitted to feature vectors (N, D) and (M, D) (arXiv:1706.08500)."""
    return gaussian_distance(fit_gaussian(generated), fit_gaussian(real))


# --- Kernel distance ---


def kernel_distance(
    generated: np.ndarray, real: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> float:
    """Unbiased squared MMD under the kernel (x.y / D + 1)^3 (KID, arXiv:1801.01401); below 0 is normal for equal sets.

    All pairs are used where both sets have at most `subset_size` vectors, else it is the mean over random subsets of
    that size (of the smaller set, if that is smaller).
    """
    size = min(len(generated), len(real), subset_size)
    if max(len(generated), len(real)) <= subset_size:
        return _unbiased_mmd(np.asarray(generated, np.float64), np.asarray(real, np.float64))
    random = np.random.default_rng(seed)
    draws = [[random.choice(len(side), size, replace=False) for side in (generated, real)] for _ in range(subsets)]
    values = [_unbiased_mmd(generated[one].astype(np.float64), real[other].astype(np.float64)) for one, other in draws]
    return float(np.mean(values))


def _unbiased_mmd(x: np.ndarray, y: np.ndarray) -> float:
    within = []
    for side in (x, y):
        kernel = (side @ side.T / side.shape[1] + 1) ** 3
        within.append((kernel.sum() - np.trace(kernel)) / (len(side) * (len(side) - 1)))
    return float(sum(within) - 2 * ((x @ y.T / x.shape[1] + 1) ** 3).mean())


# --- Nearest neighbours ---


def precision_recall(generated: np.ndarray, real: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Share of generated vectors inside the real ones' manifold, and the reverse (arXiv:1904.06991).

    The manifold of a set is the union of balls around its vectors, each reaching to the k-th nearest other one. Two
    samples of one distribution reach about 0.6, not 1.
    """
    return _share_inside(generated, real, k), _share_inside(real, generated, k)


def density_coverage(generated: np.ndarray, real: np.ndarray, k: int = 5) -> tuple[float, float]:
    """Real balls around a generated vector over k, and the share of real balls with one inside (arXiv:2002.09797).

    The balls reach to the k-th nearest other real vector. Two samples of one distribution reach about 1 and 0.97.
    """
    radii = _radii(real, k)
    inside = np.zeros(len(generated))
    covered = np.zeros(len(real), dtype=bool)
    for rows, distances in _blocks(generated, real):
        hits = distances < radii
        inside[rows] = hits.sum(axis=1)
        covered |= hits.any(axis=0)
    return float(inside.mean() / k), float(covered.mean())


def nearest(queries: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Euclidean distance (N,) from each query to its nearest other vector, and that one's index (N,)."""
    distance, index = np.empty(len(queries)), np.empty(len(queries), dtype=np.int64)
    for rows, distances in _blocks(queries, others):
        index[rows] = distances.argmin(axis=1)
        distance[rows] = np.sqrt(distances.min(axis=1))
    return distance, index


def nearest_other(features: np.ndarray) -> np.ndarray:
    """Euclidean distance (N,) from each of (N, D) vectors to its nearest other one."""
    return np.sqrt(_radii(features, 1))


def _share_inside(points: np.ndarray, manifold: np.ndarray, k: int) -> float:
    radii = _radii(manifold, k)
    return float(np.mean(np.concatenate([(d <= radii).any(axis=1) for _, d in _blocks(points, manifold)])))


def _radii(features: np.ndarray, k: int) -> np.ndarray:
    """Squared distance to the k-th nearest other vector, (N,)."""
    if len(features) <= k:
        raise ValueError(f"{len(features)} vectors have no {k}-th neighbour; give at least {k + 1}")
    return np.concatenate([np.partition(d, k, axis=1)[:, k] for _, d in _blocks(features, features)])


def _blocks(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Squared distances from rows of x to all of y, with those rows."""
    for start in range(0, len(x), BLOCK):
        rows = slice(start, min(start + BLOCK, len(x)))
        block = np.asarray(x[rows], dtype=np.float64)
        distances = np.empty((len(block), len(y)))
        for column in range(0, len(y), BLOCK):
            columns = slice(column, column + BLOCK)
            others = np.asarray(y[columns], dtype=np.float64)
            squares = np.square(block).sum(axis=1)[:, None] + np.square(others).sum(axis=1)
            part = squares - 2 * (block @ others.T)
            part[part < ROUNDING * squares] = 0
            distances[:, columns] = part
        yield rows, distances


# --- Inception score ---


def inception_score(probabilities: np.ndarray, split_size: int | None = None) -> float:
    """exp(mean KL(p(class | image) || p(class))), (N, classes) -> at least 1 (arXiv:1606.03498).

    With `split_size` it is the mean over consecutive splits of that many images (5000 in ADM's evaluator).
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    size = split_size or len(probabilities)
    scores = []
    for start in range(0, len(probabilities), size):
        part = probabilities[start : start + size]
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(part > 0, part * (np.log(part) - np.log(part.mean(axis=0))), 0)
        scores.append(np.exp(terms.sum(axis=1).mean()))
    return float(np.mean(scores))
