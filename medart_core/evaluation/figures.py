"""Which figures are taken of which features, overall and per class."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from medart_core.evaluation import colour
from medart_core.evaluation.distances import (
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from medart_core.evaluation.images import ImageSet
from medart_core.evaluation.inception import NO_CLASSIFIER, Inception
from medart_core.evaluation.measured import Measured, Statistics, compare_several

GENERAL = ("fid", "kid", "precision", "recall", "density", "coverage")
PER_CLASS = ("fid", "kid")
DOMAIN = ("domain_frechet", "domain_density", "domain_coverage")


def of_general_features(x: np.ndarray, y: np.ndarray) -> list[float]:
    """The figures GENERAL of generated against real features."""
    return [frechet_distance(x, y), kernel_distance(x, y), *precision_recall(x, y), *density_coverage(x, y)]


def of_class_features(x: np.ndarray, y: np.ndarray) -> list[float]:
    """The figures PER_CLASS."""
    return [frechet_distance(x, y), kernel_distance(x, y)]


def of_domain_features(x: np.ndarray, y: np.ndarray) -> list[float]:
    """The figures DOMAIN."""
    return [frechet_distance(x, y), *density_coverage(x, y)]


def of_colours(x: np.ndarray, y: np.ndarray) -> list[float]:
    """The figures of colour.FIGURES."""
    return [figure(x, y) for figure in colour.FIGURES.values()]


def key(name: str, label: str) -> str:
    """The name of a figure of one class."""
    return f"{name}_{label.replace(' ', '_')}"


def per_class(
    names: Sequence[str],
    statistics: Statistics,
    features: Mapping[str, np.ndarray],
    sets: Mapping[str, ImageSet],
    **settings: Any,
) -> dict[str, Measured]:
    """Statistics within each class of the generated images; both mappings have `generated` and `real`."""
    found = {}
    for label in sets["generated"].classes if sets["real"].labels else ():
        ours, theirs = (features[side][sets[side].rows_of(label)] for side in ("generated", "real"))
        measured = compare_several(names, statistics, ours, theirs, **settings)
        found |= {key(name, label): figure for name, figure in measured.items()}
    return found


def score(network: Inception, features: Mapping[str, np.ndarray], **settings: Any) -> dict[str, Measured]:
    """The Inception score of `generated`, with that of `real` as the floor; its classes are those of ImageNet."""
    classes = {side: network.probabilities(torch.from_numpy(np.array(rows))) for side, rows in features.items()}
    if classes["generated"] is None or classes["real"] is None:
        absent = Measured(None, extractor=network.name, sha256=network.sha256, note=NO_CLASSIFIER)
        return {"inception_score": absent}
    ours, theirs = classes["generated"].numpy(), classes["real"].numpy()
    return compare_several(["inception_score"], lambda x, _: [inception_score(x)], ours, theirs, **settings)


def class_mix(sets: Mapping[str, ImageSet]) -> str:
    """A remark if the classes' shares differ between `generated` and `real`, since overall figures include that."""
    ours, theirs = sets["generated"], sets["real"]
    if not (ours.labels and theirs.labels):
        return ""
    shares = [[len(side.rows_of(label)) / len(side) for label in theirs.classes] for side in (ours, theirs)]
    if all(abs(one - other) < 0.05 for one, other in zip(*shares, strict=True)):
        return ""
    mixes = [", ".join(f"{share:.0%} {label}" for share, label in zip(s, theirs.classes, strict=True)) for s in shares]
    return f"classes differ in their shares, generated {mixes[0]}; real {mixes[1]}"
