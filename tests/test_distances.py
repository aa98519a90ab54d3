"""The distances of medart_core/evaluation: closed forms, symmetry, copies, mode collapse, and independent code."""

import numpy as np
import pytest

from medart_core.evaluation.distances import (
    density_coverage,
    frechet_distance,
    gaussian,
    gaussian_distance,
    inception_score,
    kernel_distance,
    moments,
    nearest,
    precision_recall,
)


def normal(n: int, d: int, seed: int, mean: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, scale, (n, d))


def whitened(n: int, d: int, seed: int) -> np.ndarray:
    """Vectors with mean 0 and unbiased covariance I exactly."""
    x = normal(n, d, seed)
    x -= x.mean(axis=0)
    return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T


def test_frechet_distance_of_two_gaussians_has_its_closed_form() -> None:
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    one, other = rng.uniform(0.1, 4, 6), rng.uniform(0.1, 4, 6)
    shift = rng.normal(size=6)
    # Covariances with common axes: the distance is |shift|^2 + sum (sqrt(a) - sqrt(b))^2.
    expected = shift @ shift + np.square(np.sqrt(one) - np.sqrt(other)).sum()
    x = whitened(500, 6, 1) * np.sqrt(one) @ rotation.T
    y = whitened(300, 6, 2) * np.sqrt(other) @ rotation.T + shift
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)
    assert gaussian_distance(gaussian(*moments(x)), gaussian(*moments(y))) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("n", "m"), [(400, 300), (20, 30), (20, 300), (2, 2)])
def test_frechet_distance_agrees_with_the_roots_of_the_eigenvalues(n: int, m: int) -> None:
    x, y = normal(n, 40, 0), normal(m, 40, 1, 0.3, 1.5)
    (mean, cov), (other_mean, other_cov) = moments(x), moments(y)
    eigenvalues = np.linalg.eigvals(cov @ other_cov).astype(complex)  # as torch-fidelity has it
    roots = np.real(np.sqrt(eigenvalues)).sum()
    expected = np.square(mean - other_mean).sum() + np.trace(cov) + np.trace(other_cov) - 2 * roots
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(x, y) == pytest.approx(
        gaussian_distance(gaussian(mean, cov), gaussian(other_mean, other_cov)), rel=1e-6
    )
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-10)


@pytest.mark.parametrize("n", [30, 300])
def test_identical_shifted_and_disjoint_sets(n: int) -> None:
    x = normal(n, 50, 0)
    shuffled = np.random.default_rng(1).permutation(x)
    assert abs(frechet_distance(x, shuffled)) < 1e-9
    assert frechet_distance(x, x + 2) == pytest.approx(50 * 4, rel=1e-9)
    assert kernel_distance(x, shuffled) < 0.1 < kernel_distance(x, x + 2)
    assert precision_recall(x, shuffled) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)
    assert density_coverage(x, x + 100) == (0, 0)
    assert density_coverage(x, shuffled)[1] == 1


def test_kernel_distance_is_the_mean_over_pairs_and_unbiased() -> None:
    x, y = normal(7, 4, 0), normal(5, 4, 1, 0.5)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / 4 + 1) ** 3

    within = [np.mean([k(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in (x, y)]
    expected = sum(within) - 2 * np.mean([k(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-12)
    assert kernel_distance(y, x) == pytest.approx(expected, rel=1e-12)
    values = [kernel_distance(normal(20, 8, 2 * seed), normal(20, 8, 2 * seed + 1)) for seed in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
    assert min(values) < 0


def test_kernel_distance_over_subsets_is_seeded_and_near_that_of_all_pairs() -> None:
    x, y = normal(300, 8, 0), normal(260, 8, 1, 0.5)
    by_subsets = kernel_distance(x, y, subset_size=100)
    assert by_subsets == kernel_distance(x, y, subset_size=100) != kernel_distance(x, y, subset_size=100, seed=1)
    assert by_subsets == pytest.approx(kernel_distance(x, y), rel=0.15)


def test_neighbour_figures_agree_with_plain_loops(monkeypatch) -> None:
    monkeypatch.setattr("medart_core.evaluation.distances.BLOCK", 7)
    x, y = normal(40, 3, 0, 0.5), normal(30, 3, 1)

    def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.linalg.norm(a[:, None] - b[None], axis=2)

    def radius(a: np.ndarray, k: int) -> np.ndarray:
        return np.sort(distance(a, a), axis=1)[:, k]

    assert precision_recall(x, y) == (
        (distance(x, y) <= radius(y, 3)).any(axis=1).mean(),
        (distance(y, x) <= radius(x, 3)).any(axis=1).mean(),
    )
    hits = distance(x, y) < radius(y, 5)
    assert density_coverage(x, y) == pytest.approx((hits.sum() / 5 / 40, hits.any(axis=0).mean()), rel=1e-12)
    found, index = nearest(x, y)
    assert (index == distance(x, y).argmin(axis=1)).all()
    np.testing.assert_allclose(found, distance(x, y).min(axis=1))


def test_mode_collapse_is_high_precision_and_low_coverage() -> None:
    real = normal(500, 8, 0)
    collapsed = real[3] + normal(500, 8, 1, scale=0.02)
    (precision, recall), (density, coverage) = precision_recall(collapsed, real), density_coverage(collapsed, real)
    assert precision > 0.95 and density > 0.5
    assert recall < 0.05 and coverage < 0.05
    spread = normal(500, 8, 2, scale=3)  # and the reverse: everything is covered by what is mostly outside
    assert precision_recall(spread, real)[0] < 0.3 < 0.9 < precision_recall(spread, real)[1]


def test_two_samples_of_one_distribution_reach_the_known_calibration() -> None:
    one, other = normal(1000, 64, 0), normal(1000, 64, 1)
    density, coverage = density_coverage(one, other)
    assert density == pytest.approx(1, abs=0.1) and coverage == pytest.approx(0.97, abs=0.03)


def test_copies_lie_inside_their_originals() -> None:
    x = np.repeat(normal(10, 30, 0, 1e3), 6, axis=0)  # every radius is 0
    assert precision_recall(x, x) == (1, 1)
    assert (nearest(x, x)[0] == 0).all()


def test_inception_score() -> None:
    assert inception_score(np.full((10, 4), 0.25)) == pytest.approx(1)
    assert inception_score(np.eye(4)[[0, 1, 2, 3] * 3]) == pytest.approx(4)
    assert inception_score(np.eye(4)[[0, 0, 1, 1, 2, 2, 3, 3]], split_size=4) == pytest.approx(2)
    p = np.random.default_rng(0).dirichlet(np.ones(5), 9)
    kl = (p * np.log(p / p.mean(axis=0))).sum(axis=1)
    assert inception_score(p) == pytest.approx(np.exp(kl.mean()), rel=1e-12)
