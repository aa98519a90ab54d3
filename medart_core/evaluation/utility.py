"""Whether generated images can teach: a classifier trained on them and tested on held-out real images."""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from medart_core.errors import UserError
from medart_core.evaluation import classifier
from medart_core.evaluation.measured import Measured
from medart_core.evaluation.small_resnet import BATCH

SEEDS = (0, 1, 2, 3, 4)
APART = 1000  # added to the seeds, so that no network here is the one that another figure's features come from
STEPS = 500  # of every fit, at most, however many images it has
RESAMPLES, INTERVAL = 300, (2.5, 97.5)  # percentiles

Metric = Callable[[np.ndarray, np.ndarray], float]


class Examples(NamedTuple):
    """Labelled images, small enough to be kept: what `small_resnet.shrink` returns, and a label for each.

    `groups` say which belong together, such as patients; None: each stands for itself.
    """

    images: Tensor  # (N, 3, side, side) uint8
    labels: Sequence[str]
    groups: Sequence[Hashable] | None = None


# --- Metrics of probabilities (N, K) and class numbers (N,): means over the classes that occur ---


def recalls(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Share of each class's images whose most probable class is right, (K,); NaN for a class that does not occur."""
    classes = probabilities.shape[1]
    hits = np.bincount(targets[probabilities.argmax(axis=1) == targets], minlength=classes)
    counts = np.bincount(targets, minlength=classes)
    return np.where(counts > 0, hits / np.maximum(counts, 1), np.nan)


def balanced_accuracy(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Mean of the classes' recalls; guessing gives 1 / K."""
    return float(np.nanmean(recalls(probabilities, targets)))


def macro_f1(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Mean of the classes' 2 TP / (2 TP + FP + FN)."""
    classes = probabilities.shape[1]
    guesses = probabilities.argmax(axis=1)
    hits = np.bincount(targets[guesses == targets], minlength=classes)
    counts = np.bincount(targets, minlength=classes)
    scores = 2 * hits / np.maximum(counts + np.bincount(guesses, minlength=classes), 1)
    return float(scores[counts > 0].mean())


def area_under_curve(scores: np.ndarray, is_positive: np.ndarray) -> float:
    """The chance that a positive has a higher score than a negative, equal ones counting half: in [0, 1].

    It is the area under the ROC curve (the Mann-Whitney statistic, from mean ranks); NaN without both kinds.
    """
    positives, negatives = int(is_positive.sum()), int((~is_positive).sum())
    if not positives or not negatives:
        return math.nan
    _, place, ties = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(ties) - (ties - 1) / 2)[place]
    return float((ranks[is_positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def auroc(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Mean of the classes' areas under the curve of that class against the rest; NaN if there is but one class."""
    areas = [area_under_curve(scores, targets == number) for number, scores in enumerate(probabilities.T)]
    return float(np.mean([area for area in areas if not math.isnan(area)] or [math.nan]))


METRICS: dict[str, Metric] = {"balanced_accuracy": balanced_accuracy, "macro_f1": macro_f1, "auroc": auroc}


# --- The comparison ---


def utility(
    real_train: Examples,
    real_test: Examples,
    synthetic: Examples,
    seeds: Sequence[int] = SEEDS,
    *,
    steps: int = STEPS,
    device: torch.device | str = "cpu",
    show_progress: bool = False,
) -> dict[str, Measured]:
    """Classifiers trained on real, on synthetic and on both kinds of images, all tested on the same real images.

    Every fit has the same number of steps and chooses its epoch on a held-out part of its own images, so that the
    test images decide nothing. Values are means over the seeds; the intervals are from resampling the seeds and the
    test images (whole patients, where `real_test` has groups), the same ones for all three.

    Returns:
        `utility_{real,synthetic,both}_{balanced_accuracy,macro_f1,auroc,recall_CLASS}` in [0, 1], each with the value
        of real training images as its floor, and `utility_ratio`, the balanced accuracy of synthetic over real. Only
        the latter, with the reason, if a class has no images, or too few of them, in one of the training sets.
    """
    classes = sorted(set(real_train.labels))
    targets = classifier.numbers(real_test.labels, classes).numpy()
    arms = {"real": real_train, "synthetic": synthetic, "both": _together(real_train, synthetic)}
    work = [(arm, seed) for seed in seeds for arm in arms]
    probabilities: dict[str, list[np.ndarray]] = {arm: [] for arm in arms}
    for arm, seed in tqdm(work, "utility", disable=not show_progress):
        images, labels, groups = arms[arm]
        epochs = math.ceil(steps / max(1, len(labels) * 4 // 5 // BATCH))
        try:
            fitted = classifier.fit(
                images, labels, classes=classes, seed=APART + seed, epochs=epochs, device=device, groups=groups,
                side=images.shape[-1],
            )  # fmt: skip
        except UserError as error:
            return {"utility_ratio": Measured(None, note=f"{arm} images: {error}")}
        probabilities[arm].append(fitted.predict(real_test.images).numpy())
    return _measure(probabilities, targets, classes, real_test.groups, len(real_train.labels), len(synthetic.labels))


def _together(real: Examples, synthetic: Examples) -> Examples:
    count = len(synthetic.labels)
    groups = None if real.groups is None else [*real.groups, *(("synthetic", row) for row in range(count))]
    return Examples(torch.cat([real.images, synthetic.images]), [*real.labels, *synthetic.labels], groups)


def _measure(
    probabilities: dict[str, list[np.ndarray]],
    targets: np.ndarray,
    classes: Sequence[str],
    groups: Sequence[Hashable] | None,
    n_real: int,
    n_synthetic: int,
) -> dict[str, Measured]:
    """The figures of the three arms, from one (N, K) of the test images per arm and seed."""
    names = [*METRICS, *(f"recall_{label.replace(' ', '_')}" for label in classes)]
    num_seeds = len(probabilities["real"])
    draws = list(_draws(num_seeds, groups if groups is not None else range(len(targets))))
    trained_on = {"real": (n_real, 0), "synthetic": (0, n_synthetic), "both": (n_real, n_synthetic)}
    figures, values, spreads = {}, {}, {}
    for arm, outputs in probabilities.items():
        values[arm] = np.mean([_all_metrics(output, targets) for output in outputs], axis=0)
        spreads[arm] = np.array(
            [np.mean([_all_metrics(outputs[seed][rows], targets[rows]) for seed in seeds], 0) for seeds, rows in draws]
        )
        low, high = np.nanpercentile(spreads[arm], INTERVAL, axis=0).tolist()
        floors = [None] * len(names) if arm == "real" else values["real"].tolist()
        real, generated = trained_on[arm]
        note = f"trained on {real} real and {generated} generated images, seeds: {num_seeds}"
        for name, value, least, most, floor in zip(names, values[arm].tolist(), low, high, floors, strict=True):
            measured = Measured(value, least, most, generated, len(targets), floor, note=note)
            figures[f"utility_{arm}_{name}"] = measured
    ratio = float(values["synthetic"][0] / values["real"][0])
    low, high = np.nanpercentile(spreads["synthetic"][:, 0] / spreads["real"][:, 0], INTERVAL).tolist()
    note = f"balanced accuracy, trained on {n_synthetic} generated over trained on {n_real} real images"
    figures["utility_ratio"] = Measured(ratio, low, high, n_synthetic, len(targets), note=note)
    return figures


def _all_metrics(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return np.array(
        [*(metric(probabilities, targets) for metric in METRICS.values()), *recalls(probabilities, targets)]
    )


def _draws(num_seeds: int, groups: Sequence[Hashable]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Seeds, and rows of the test images, drawn with replacement, whole groups at a time."""
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    blocks = [np.array(rows) for rows in members.values()]
    random = np.random.default_rng(0)
    for _ in range(RESAMPLES):
        seeds = random.integers(num_seeds, size=num_seeds)
        yield seeds, np.concatenate([blocks[index] for index in random.integers(len(blocks), size=len(blocks))])
