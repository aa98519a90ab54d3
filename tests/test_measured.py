"""Intervals and floors of the figures in a report."""

import numpy as np
import pytest

from medart_core.evaluation.distances import density_coverage, frechet_distance, kernel_distance
from medart_core.evaluation.measured import MIN_IMAGES, Measured, compare


def mean_difference(x: np.ndarray, y: np.ndarray) -> float:
    return float(x.mean() - y.mean())


def interval(found: Measured) -> tuple[float, float, float]:
    """Low, high and floor."""
    assert found.low is not None and found.high is not None and found.floor is not None
    return found.low, found.high, found.floor


def normal(n: int, d: int, seed: int, mean: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1, (n, d))


def test_interval_is_that_of_the_closed_form_and_covers() -> None:
    half_widths, covered = [], 0
    for seed in range(100):
        found = compare(mean_difference, normal(60, 1, 2 * seed, 1), normal(60, 1, 2 * seed + 1), seed=seed)
        low, high, _ = interval(found)
        half_widths.append(high - low)
        covered += low <= 1 <= high
    # A mean of n minus a mean of n has the standard error sqrt(2 / n).
    assert np.mean(half_widths) / 2 == pytest.approx(1.96 * np.sqrt(2 / 60), rel=0.05)
    assert covered >= 88


@pytest.mark.parametrize("statistic", [frechet_distance, kernel_distance, lambda x, y: density_coverage(x, y)[1]])
def test_real_images_measure_as_their_floor(statistic) -> None:
    found = compare(statistic, normal(60, 8, 0), normal(300, 8, 1))
    low, high, floor = interval(found)
    assert low <= floor <= high
    assert (found.n_generated, found.n_real, found.note) == (60, 60, "")
    low, high, floor = interval(compare(statistic, normal(60, 8, 0, 1), normal(300, 8, 1)))
    assert not low <= floor <= high


def test_equal_numbers_and_where_the_floor_comes_from() -> None:
    seen = []

    def statistic(x: np.ndarray, y: np.ndarray) -> float:
        seen.append((len(x), len(y), x.min() > 5))
        return 0.0

    few, many = normal(40, 2, 0), normal(100, 2, 1)
    compare(statistic, few, many, resamples=2)
    assert set(seen) == {(40, 40, False), (20, 20, False)}
    seen.clear()
    found = compare(statistic, many, few, resamples=2)
    assert set(seen) == {(40, 40, False), (20, 20, False)} and "floor at 20" in found.note
    seen.clear()
    found = compare(statistic, many, few, spare=normal(50, 2, 3, 100), resamples=2)
    assert set(seen) == {(40, 40, False), (40, 40, True), (20, 20, False)} and found.note == ""


def test_same_seed_same_figures_and_too_few_images() -> None:
    x, y = normal(20, 4, 0), normal(50, 4, 1)
    assert compare(frechet_distance, x, y, seed=3) == compare(frechet_distance, x, y, seed=3)
    assert compare(frechet_distance, x, y, seed=3) != compare(frechet_distance, x, y, seed=4)
    few = compare(frechet_distance, x[: MIN_IMAGES - 1], y)
    assert few.value is None and "too few" in few.note
