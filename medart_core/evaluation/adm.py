"""The figures of ADM's evaluator, by its definitions, from its two files: a reference .npz and a sample .npz.

Definitions: guided-diffusion, evaluations/evaluator.py (github.com/openai/guided-diffusion at 22e0df8): Frechet
distances of unbiased moments, precision and recall with k = 3 on all images, the Inception score without the
classifier's bias over splits of 5000. Features come from a PyTorch Inception, so the last digits differ from its own.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from medart_core.errors import UserError
from medart_core.evaluation import images, npz
from medart_core.evaluation.distances import (
    Gaussian,
    fit_gaussian,
    gaussian,
    gaussian_distance,
    inception_score,
    precision_recall,
)
from medart_core.evaluation.features import Extractor, extract, rank_and_size
from medart_core.evaluation.inception import NO_CLASSIFIER, NUM_FEATURES
from medart_core.evaluation.measured import Measured

SPLIT = 5000
MOMENTS = ("mu", "sigma", "mu_s", "sigma_s")


class AdmExtractor(Extractor, Protocol):
    """An extractor of pooled features with the spatial ones behind them, and perhaps of class probabilities."""

    def probabilities(self, features: Tensor) -> Tensor | None:
        """(N, classes) of pooled features."""
        ...


class Side(NamedTuple):
    """One file: its features if it has images, and the Gaussians of both kinds of features."""

    features: np.ndarray | None  # (N, 2048 + 2023)
    pooled: Gaussian
    spatial: Gaussian


def read_side(path: Path, extractor: AdmExtractor, cache: Path) -> Side:
    """Features and Gaussians of a file; moments that it carries are taken as they are.

    Raises:
        UserError: if the file has neither images nor all four moments, or moments of a wrong shape.
    """
    names = npz.keys(path)
    features = None
    if "arr_0" in names:
        features = extract(images.read(path, show_progress=rank_and_size()[0] == 0), extractor, cache)
    if "mu" in names:
        if missing := [name for name in MOMENTS if name not in names]:
            raise UserError(f"{path} has mu but no {missing[0]}; give a file with {', '.join(MOMENTS)}")
        found = [np.asarray(npz.read(path, name), dtype=np.float64) for name in MOMENTS]
        sizes = (NUM_FEATURES, extractor.num_features - NUM_FEATURES)
        if [part.shape for part in found] != [shape for size in sizes for shape in ((size,), (size, size))]:
            raise UserError(
                f"{path}: the moments have the shapes {[part.shape for part in found]}, not those of {sizes} "
                "features; give a file that ADM's evaluator reads"
            )
        return Side(features, gaussian(found[0], found[1]), gaussian(found[2], found[3]))
    if features is None:
        raise UserError(
            f"{path} has neither arr_0 nor mu (it has: {', '.join(names)}); give ADM's reference or samples"
        )
    return Side(features, fit_gaussian(features[:, :NUM_FEATURES]), fit_gaussian(features[:, NUM_FEATURES:]))


def figures(reference: Side, samples: Side, extractor: AdmExtractor) -> dict[str, Measured]:
    """`inception_score`, `fid`, `sfid`, `precision` and `recall` of the samples.

    Raises:
        UserError: if the sample file holds no images.
    """
    if samples.features is None:
        raise UserError("the sample file has no arr_0; give one with images")
    blank = Measured(None, n_generated=len(samples.features), extractor=extractor.name, sha256=extractor.sha256)
    given = replace(blank, n_real=0 if reference.features is None else len(reference.features))
    how = "" if given.n_real else "against the reference file's moments"
    found = {
        "fid": replace(given, value=gaussian_distance(samples.pooled, reference.pooled), note=how),
        "sfid": replace(given, value=gaussian_distance(samples.spatial, reference.spatial), note=how),
    }
    pooled = samples.features[:, :NUM_FEATURES]
    probabilities = extractor.probabilities(torch.from_numpy(np.array(pooled)))
    if probabilities is None:
        found["inception_score"] = replace(blank, note=NO_CLASSIFIER)
    else:
        found["inception_score"] = replace(blank, value=inception_score(probabilities.numpy(), SPLIT))
    if reference.features is None:
        absent = replace(blank, note="the reference file has no images")
        return found | {"precision": absent, "recall": absent}
    precision, recall = precision_recall(pooled, reference.features[:, :NUM_FEATURES])
    return found | {"precision": replace(given, value=precision), "recall": replace(given, value=recall)}
