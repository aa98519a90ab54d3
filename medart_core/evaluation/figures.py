"""The groups of figures of a report: quality, domain, colour, usefulness and privacy.

Sets and feature rows are mappings with the keys `generated`, `real` and, where the training images are given, `train`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from medart_core import attribute_phrases, attributes
from medart_core.errors import UserError
from medart_core.evaluation import colour, fidelity, privacy, reidentification, small_resnet, utility
from medart_core.evaluation.classifier import Classifier
from medart_core.evaluation.colour import ColourExtractor
from medart_core.evaluation.distances import (
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from medart_core.evaluation.features import Extractor
from medart_core.evaluation.images import ImageSet
from medart_core.evaluation.inception import BY_HAND, NO_CLASSIFIER, Inception
from medart_core.evaluation.measured import Measured, compare_several
from medart_core.evaluation.reidentification import patients_of
from medart_core.evaluation.utility import Examples

Sets: TypeAlias = Mapping[str, ImageSet]
Rows: TypeAlias = Mapping[str, np.ndarray]

NOT_NEGATIVE, SHARE = (0.0, math.inf), (0.0, 1.0)
QUALITY = {
    "fid": NOT_NEGATIVE, "kid": (-math.inf, math.inf), "precision": SHARE, "recall": SHARE, "density": NOT_NEGATIVE,
    "coverage": SHARE,
}  # fmt: skip
DOMAIN = {"domain_frechet": NOT_NEGATIVE, "domain_density": NOT_NEGATIVE, "domain_coverage": SHARE}
PRIVACY = ("authpct", "authpct_gap", "nearest_distance", "near_share", "duplicate_share")

NO_DOMAIN = "needs a classifier; fit one with python evaluate.py fit-extractor, and give it with --extractor"
NO_TRAIN = "needs the training images; give --train"
NO_ATTRIBUTES = "the prompts name no attribute that is measured on pixels; sample from VSG.py's captions"
NO_CLASSES = "needs the classes of all images, in metadata.csv, by folders or by prompts that name them"


def absent(names: Sequence[str], why: str) -> dict[str, Measured]:
    """Figures that were not measured, with the reason and what to do."""
    return dict.fromkeys(names, Measured(None, note=why))


def _made_with(extractor: Extractor) -> dict[str, str]:
    return {"extractor": extractor.name, "sha256": extractor.sha256}


# --- Quality ---


def quality(network: Inception | None, rows: Rows, sets: Sets, **settings: Any) -> dict[str, Measured]:
    """FID, KID, precision, recall, density, coverage and Inception score; FID and KID per class."""
    if network is None:
        return absent([*QUALITY, "inception_score"], f"there is no Inception; {BY_HAND}")

    def overall(x: np.ndarray, y: np.ndarray) -> list[float]:
        return [frechet_distance(x, y), kernel_distance(x, y), *precision_recall(x, y), *density_coverage(x, y)]

    def of_class(x: np.ndarray, y: np.ndarray) -> list[float]:
        return [frechet_distance(x, y), kernel_distance(x, y)]

    settings |= _made_with(network)
    ours, theirs = rows["generated"], rows["real"]
    found = compare_several(
        list(QUALITY), overall, ours, theirs, limits=QUALITY, spare=rows.get("train"), note=class_mix(sets), **settings
    )
    classes = [network.probabilities(torch.from_numpy(np.array(side))) for side in (ours, theirs)]
    if classes[0] is None or classes[1] is None:
        found["inception_score"] = Measured(None, extractor=network.name, sha256=network.sha256, note=NO_CLASSIFIER)
    else:
        numbers = classes[0].numpy(), classes[1].numpy()
        found |= compare_several(["inception_score"], lambda x, _: [inception_score(x)], *numbers, **settings)
    for label in sets["generated"].classes if sets["real"].labels else ():
        ours, theirs = (rows[side][sets[side].rows_of(label)] for side in ("generated", "real"))
        names = [f"{name}_{label.replace(' ', '_')}" for name in ("fid", "kid")]
        found |= compare_several(names, of_class, ours, theirs, limits={names[0]: NOT_NEGATIVE}, **settings)
    return found


def class_mix(sets: Sets) -> str:
    """A remark if the classes' shares differ between `generated` and `real`, since overall figures include that."""
    ours, theirs = sets["generated"], sets["real"]
    if not (ours.labels and theirs.labels):
        return ""
    shares = [[len(side.rows_of(label)) / len(side) for label in theirs.classes] for side in (ours, theirs)]
    if all(abs(one - other) < 0.05 for one, other in zip(*shares, strict=True)):
        return ""
    mixes = [", ".join(f"{share:.0%} {label}" for share, label in zip(s, theirs.classes, strict=True)) for s in shares]
    return f"classes differ in their shares, generated {mixes[0]}; real {mixes[1]}"


def domain(classifier: Classifier | None, rows: Rows, **settings: Any) -> dict[str, Measured]:
    """Frechet distance, density and coverage in the features of a classifier of the training images.

    Their floor never comes from training images, whose features the fit has drawn together.
    """
    if classifier is None:
        return absent(list(DOMAIN), NO_DOMAIN)

    def statistics(x: np.ndarray, y: np.ndarray) -> list[float]:
        return [frechet_distance(x, y), *density_coverage(x, y)]

    settings |= _made_with(classifier)
    return compare_several(list(DOMAIN), statistics, rows["generated"], rows["real"], limits=DOMAIN, **settings)


def colours(extractor: ColourExtractor, rows: Rows, **settings: Any) -> dict[str, Measured]:
    """What HLDF is for; it needs no network."""
    names, limits = list(colour.FIGURES), dict.fromkeys(colour.FIGURES, NOT_NEGATIVE)

    def statistics(x: np.ndarray, y: np.ndarray) -> list[float]:
        return [figure(x, y) for figure in colour.FIGURES.values()]

    settings |= _made_with(extractor) | {"spare": rows.get("train")}
    return compare_several(names, statistics, rows["generated"], rows["real"], limits=limits, **settings)


# --- Usefulness and privacy ---


def examples(sets: Sets) -> dict[str, Examples]:
    """The sets that have classes, shrunk to what the classifiers see, with their patients where names tell them."""
    return {
        side: Examples(small_resnet.shrink(found.batches()), found.labels, patients_of(found.names))
        for side, found in sets.items()
        if found.labels
    }


def agreement(classifier: Classifier | None, known: Mapping[str, Examples]) -> dict[str, Measured]:
    """How often a classifier of real images sees what the prompt asked for."""
    if classifier is None:
        return absent(["class_agreement"], NO_DOMAIN)
    if not {"generated", "real"} <= known.keys():
        return absent(["class_agreement"], NO_CLASSES)
    return fidelity.class_agreement(classifier, known["generated"], known["real"])


def described(sets: Sets) -> dict[str, Measured]:
    """How often the pixels show what the prompts say of brightness, haze and so on, beside real captions."""
    texts = {side: sets[side].texts or () for side in ("generated", "real")}
    domain = attribute_phrases.domain_of(texts["generated"])
    if domain is None:
        return absent(["attribute_agreement"], NO_ATTRIBUTES)
    claims = {side: [attribute_phrases.parse(domain, text) for text in texts[side]] for side in texts}
    shown = {side: [attributes.measure(domain, sets[side].image(row)) for row in range(len(texts[side]))]
             for side in texts}  # fmt: skip
    return fidelity.attribute_agreement(claims["generated"], shown["generated"], claims["real"], shown["real"])


def usefulness(known: Mapping[str, Examples], seeds: int, **settings: Any) -> dict[str, Measured]:
    """How well a classifier that saw only generated images knows real ones, beside one that saw real ones."""
    if not seeds:
        return absent(["utility_ratio"], "left out by --utility-seeds 0")
    if not {"generated", "real", "train"} <= known.keys():
        return absent(["utility_ratio"], f"{NO_TRAIN}; {NO_CLASSES}")
    return utility.utility(known["train"], known["real"], known["generated"], range(seeds), **settings)


def recognised(known: Mapping[str, Examples], seed: int, **settings: Any) -> dict[str, Measured]:
    """Whether generated images show training patients, to a network that tells patients apart."""
    if not {"generated", "real", "train"} <= known.keys() or not (known["train"].groups and known["real"].groups):
        return absent(["reid_matches"], "needs training and real images whose file names tell the patients")
    try:
        embedding = reidentification.fit(known["train"], seed=seed, **settings)
    except UserError as error:
        return absent(["reid_matches"], str(error))
    return reidentification.reidentify(embedding, known["generated"].images, known["train"], known["real"])[0]


class PixelExtractor:
    """Shrunk pixels, for distances between images that no fitted network has an opinion on."""

    name = f"pixels at {privacy.PIXEL_SIDE} px"
    sha256 = "0" * 64
    num_features = 3 * privacy.PIXEL_SIDE**2

    def __call__(self, images: Tensor, /) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 3072)."""
        return torch.from_numpy(privacy.pixel_vectors(images))


def copying(rows: Rows, sets: Sets) -> tuple[dict[str, Measured], list[privacy.Pair], list[privacy.Pair]]:
    """Figures of `PixelExtractor` rows, the closest pairs, and the pairs that count as copies."""
    if "train" not in sets:
        return absent(PRIVACY, NO_TRAIN), [], []
    ours, train, held_out = (np.array(rows[side]) for side in ("generated", "train", "real"))
    found = privacy.distance_figures(ours, train, held_out, extractor=PixelExtractor.name)
    hashes = {side: privacy.hashes(map(images.image, range(len(images)))) for side, images in sets.items()}
    found["duplicate_share"] = privacy.duplicate_share(hashes["generated"], hashes["train"], hashes["real"])
    return found, privacy.closest_pairs(ours, train), privacy.duplicates(hashes["generated"], hashes["train"])
