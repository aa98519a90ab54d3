"""Whether generated images show what their prompts say: the class to a classifier, attributes on the pixels."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from medart_core.errors import UserError
from medart_core.evaluation.classifier import Classifier, numbers
from medart_core.evaluation.measured import MARGIN, Measured
from medart_core.evaluation.shares import share
from medart_core.evaluation.utility import Examples


def class_agreement(classifier: Classifier, generated: Examples, held_out: Examples) -> dict[str, Measured]:
    """How often a classifier of real images sees the class that was asked for, beside how often it is right at all.

    Classes count alike on both sides, so that the figures do not depend on how many images of each were generated.

    Args:
        classifier: fitted on real images, none of which is in `held_out`.
        generated: labelled with the classes in their prompts.

    Returns:
        `class_agreement`, with the accuracy on held-out real images of these classes as its floor;
        `class_agreement_CLASS`, the same of one class; `class_agreement_ratio`, agreement over accuracy.

    Raises:
        UserError: for a class that the classifier does not know, or that no held-out image has.
    """
    (hits, counts), (real_hits, real_counts) = _hits(classifier, generated), _hits(classifier, held_out)
    asked = np.flatnonzero(counts)
    if missing := [classifier.classes[number] for number in asked if not real_counts[number]]:
        raise UserError(f"no held-out image is labelled {missing[0]!r}, which was asked for; give some")
    sizes, origin = (len(generated.labels), int(real_counts[asked].sum())), (classifier.name, classifier.sha256)
    value, error = _mean_share(hits[asked], counts[asked])
    accuracy, real_error = _mean_share(real_hits[asked], real_counts[asked])
    low, high = max(0.0, value - MARGIN * error), min(1.0, value + MARGIN * error)
    figures = {"class_agreement": Measured(value, low, high, *sizes, accuracy, *origin)}
    if accuracy:
        ratio, margin = value / accuracy, MARGIN * math.hypot(error, value / accuracy * real_error) / accuracy
        note = f"agreement over the classifier's own accuracy of {accuracy:.3f} on held-out images"
        figures["class_agreement_ratio"] = Measured(
            ratio, max(0.0, ratio - margin), ratio + margin, *sizes, None, *origin, note
        )
    for number in asked.tolist():
        right, sizes = int(hits[number]), (int(counts[number]), int(real_counts[number]))
        name = f"class_agreement_{classifier.classes[number].replace(' ', '_')}"
        floor = float(real_hits[number] / real_counts[number])
        figures[name] = Measured(*share(right, sizes[0]), *sizes, floor, *origin)
    return figures


def _hits(classifier: Classifier, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    """Of each class: images whose most probable class is right, and images, (K,) each."""
    targets = numbers(examples.labels, classifier.classes).numpy()
    guesses = classifier.predict(examples.images).argmax(dim=1).numpy()
    classes = len(classifier.classes)
    return np.bincount(targets[guesses == targets], minlength=classes), np.bincount(targets, minlength=classes)


def _mean_share(hits: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Mean of the shares of several classes, and its standard error."""
    # With one more hit and one more miss, a class that is always right still has an error.
    softened = (hits + 1) / (counts + 2)
    return float((hits / counts).mean()), float(np.sqrt((softened * (1 - softened) / counts).sum()) / len(counts))


Attributes = Mapping[str, str | None]


def attribute_agreement(
    claims: Sequence[Attributes],
    measured: Sequence[Attributes],
    real_claims: Sequence[Attributes] = (),
    real_measured: Sequence[Attributes] = (),
) -> dict[str, Measured]:
    """How often an attribute measured on the pixels of a generated image is what its prompt claims.

    Args:
        claims: per generated image the value of each attribute in its prompt, None where it names none.
        measured: per generated image the values of `attributes.measure`.
        real_claims, real_measured: the same of captioned real images, for the floor.

    Returns:
        `attribute_agreement_NAME` for each attribute that a prompt names, of the images whose prompts name it, the
        chance agreement of shuffled prompts in its note; before them `attribute_agreement`, their mean.
    """
    figures: dict[str, Measured] = {}
    hits, counts, floors = [], [], []
    for name in sorted({name for claim in claims for name, value in claim.items() if value is not None}):
        pairs, real_pairs = _pairs(name, claims, measured), _pairs(name, real_claims, real_measured)
        right, n, n_real = sum(claim == found for claim, found in pairs), len(pairs), len(real_pairs)
        floor = sum(claim == found for claim, found in real_pairs) / n_real if n_real else None
        note = f"chance agreement {_chance(pairs):.3f}"
        figures[f"attribute_agreement_{name}"] = Measured(*share(right, n), n, n_real, floor, note=note)
        hits, counts, floors = [*hits, right], [*counts, n], [*floors, floor]
    if figures:
        value, error = _mean_share(np.array(hits), np.array(counts))
        low, high = max(0.0, value - MARGIN * error), min(1.0, value + MARGIN * error)
        floor = None if None in floors else float(np.mean(floors))
        note = "mean of " + ", ".join(name.removeprefix("attribute_agreement_") for name in figures)
        sizes = len(claims), len(real_claims)
        figures = {"attribute_agreement": Measured(value, low, high, *sizes, floor, note=note)} | figures
    return figures


def _pairs(name: str, claims: Sequence[Attributes], measured: Sequence[Attributes]) -> list[tuple[str, str | None]]:
    """What is claimed and what is found of one attribute, for the images whose prompts name it."""
    both = [(claim.get(name), found.get(name)) for claim, found in zip(claims, measured, strict=True)]
    return [(claim, found) for claim, found in both if claim is not None]


def _chance(pairs: Sequence[tuple[str, str | None]]) -> float:
    """Share of agreeing pairs if the prompts were dealt to the images at random."""
    claimed, found = [claim for claim, _ in pairs], [found for _, found in pairs]
    return sum(claimed.count(value) * found.count(value) for value in set(claimed)) / len(pairs) ** 2
