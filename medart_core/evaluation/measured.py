"""A figure with what makes it believable: an interval, the floor that real images reach, and what it was made with."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

REFERENCES = 5  # random real references (and floors) that a figure is averaged over
MARGIN = 1.96  # standard deviations of a 95 % interval
MIN_IMAGES = 16  # on each side: a half of them still has neighbours

Statistic = Callable[[np.ndarray, np.ndarray], float]
Statistics = Callable[[np.ndarray, np.ndarray], Sequence[float]]


@dataclass(frozen=True)
class Measured:
    """One figure of a report; `value` is None where it could not be measured, and `note` says why.

    `low` and `high` are a 95 % interval. `n_generated` and `n_real` images were compared, on the features of the
    extractor with that name and sha256. `floor` is the same figure for real images against other real ones.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n_generated: int = 0
    n_real: int = 0
    floor: float | None = None
    extractor: str | None = None
    sha256: str | None = None
    note: str = ""


def compare(statistic: Statistic, generated: np.ndarray, real: np.ndarray, **settings: Any) -> Measured:
    """One statistic as `compare_several` measures it."""
    return compare_several(["value"], lambda x, y: [statistic(x, y)], generated, real, **settings)["value"]


def compare_several(
    names: Sequence[str],
    statistics: Statistics,
    generated: np.ndarray,
    real: np.ndarray,
    *,
    extractor: str | None = None,
    sha256: str | None = None,
    spare: np.ndarray | None = None,
    resamples: int = 50,
    seed: int = 0,
    note: str = "",
    limits: Mapping[str, tuple[float, float]] | None = None,
) -> dict[str, Measured]:
    """Named statistics of generated against real features, (N, D) and (M, D), with equal numbers on both sides.

    Of n = min(N, M) vectors each; the value is the mean over random choices of the larger side. Its interval is from
    `resamples` random halves of both sides, drawn without replacement: they spread as the figure of a whole sample
    does (the delete-half jackknife; J. Shao and C. F. J. Wu, Annals of Statistics 17, 1989), and unlike a bootstrap's
    they hold no copies, which all figures here would take for close neighbours. Halves are biased, so their spread is
    put around the value. The floor has n other real vectors in place of the generated ones: the rest of `real` if it
    is large enough, else vectors of `spare`, else it compares halves of `real`, which the note then says. Intervals
    are cut at a statistic's `limits`.
    """
    random = np.random.default_rng(seed)

    def some(vectors: np.ndarray, count: int) -> np.ndarray:
        return vectors[random.permutation(len(vectors))[:count]]

    n = min(len(generated), len(real))
    if n < MIN_IMAGES:
        why = f"{len(generated)} generated and {len(real)} real images are too few; at least {MIN_IMAGES} are needed"
        few = Measured(None, None, None, len(generated), len(real), None, extractor, sha256, why)
        return dict.fromkeys(names, few)
    values, floors = [], []
    use_spare = spare is not None and needs_spare(len(generated), len(real)) and len(spare) >= n
    floor_n = n if use_spare else min(n, len(real) // 2)
    for _ in range(REFERENCES):
        shuffled = some(real, len(real))
        values.append(statistics(some(generated, n), shuffled[:n]))
        others = some(spare, n) if spare is not None and use_spare else shuffled[floor_n : 2 * floor_n]
        floors.append(statistics(others, shuffled[:floor_n]))
    one, other = some(generated, n), some(real, n)
    halves = [statistics(some(one, n // 2), some(other, n // 2)) for _ in range(resamples)]
    if floor_n < n:
        note = "; ".join(filter(None, [note, f"floor at {floor_n} images: there are no more real ones"]))
    found = {}
    for column, name in enumerate(names):
        value, floor = (float(np.mean(rows, axis=0)[column]) for rows in (values, floors))
        margin = MARGIN * float(np.std(halves, axis=0, ddof=1)[column])
        lowest, highest = (limits or {}).get(name, (-math.inf, math.inf))
        low, high = max(lowest, value - margin), min(highest, value + margin)
        found[name] = Measured(value, low, high, n, n, floor, extractor, sha256, note)
    return found


def needs_spare(num_generated: int, num_real: int) -> bool:
    """Whether the real images are too few for a floor at the same number."""
    return num_real < 2 * min(num_generated, num_real)
