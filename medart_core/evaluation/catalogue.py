"""What the figures of an evaluation are called, which question each answers, and how it is put to a reader."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from medart_core.evaluation.measured import Measured


class Title(NamedTuple):
    """What a figure is called, which direction is better, and what it says."""

    name: str
    better: str = ""
    says: str = ""


# The figures by the question that they answer, in the order of a report.
QUESTIONS: dict[str, dict[str, Title]] = {
    "Do they look like real ones?": {
        "fid": Title("FID", "lower", "Frechet distance of Inception features; mostly bias at a few hundred images"),
        "kid": Title("KID", "lower", "kernel distance of Inception features, unbiased; 0 for equal sets"),
        "precision": Title("precision", "higher", "share of generated images among the real ones"),
        "density": Title("density", "higher", "how thick generated images lie where real ones are"),
        "domain_frechet": Title(
            "domain Frechet distance", "lower", "the same distance for a classifier of this domain"
        ),
        "domain_density": Title("density, domain", "higher", "in that classifier's features"),
        "inception_score": Title(
            "Inception score", "higher", "over ImageNet's classes; means little on medical images"
        ),
    },
    "Are they as varied as real ones?": {
        "coverage": Title("coverage", "higher", "share of real images with a generated one nearby"),
        "domain_coverage": Title("coverage, domain", "higher", "the same in that classifier's features"),
        "recall": Title("recall", "higher", "share of real images among the generated ones"),
        "colour_diversity": Title(
            "colour diversity", "near 1", "variance of the images' mean colours over that of real ones"
        ),
    },
    "Are the colours right?": {
        "colour_statistics_distance": Title(
            "colour distance", "lower", "of average channel means and deviations, [-1, 1]"
        ),
        "chroma_error": Title("chroma error", "lower", "difference of the average colourfulness, [-1, 1]"),
        "colour_histogram_distance": Title(
            "colour histogram distance", "lower", "earth mover's, mean of channels, [-1, 1]"
        ),
    },
    "Do they show what was asked for?": {
        "class_agreement": Title(
            "agreement with the prompt", "higher", "share that a classifier of real images sees as asked"
        ),
        "class_agreement_ratio": Title(
            "agreement over accuracy", "higher", "over that classifier's accuracy on real images"
        ),
        "attribute_agreement": Title("attributes as asked", "higher", "share whose pixels show what the prompt says"),
    },
    "Can a classifier learn from them?": {
        "utility_ratio": Title(
            "usefulness",
            "higher",
            "accuracy that a classifier learns from generated images, over what it learns from real ones",
        ),
        "utility_synthetic": Title(
            "trained on generated images", "higher", "a classifier's figures on held-out real images"
        ),
        "utility_both": Title("trained on both", "higher", "figures on the same held-out real images"),
        "utility_real": Title("trained on real images", "", "figures on the same held-out real images"),
    },
    "Do they repeat training images?": {
        "duplicate_share": Title("duplicates of training images", "as floor", "share by a perceptual hash"),
        "authpct_gap": Title(
            "authenticity gap, points",
            "near 0",
            "authentic images against training images minus those against held-out images; below 0: copies",
        ),
        "authpct": Title(
            "authentic images, %", "as floor", "farther from the training images than those are from each other"
        ),
        "nearest_distance": Title(
            "distance to training images", "as floor", "median to the nearest one, root mean square in [0, 1]"
        ),
        "near_share": Title("near training images", "as floor", "share nearer than all but 1 % of held-out images"),
        "reid_matches": Title(
            "matches with training patients", "as floor", "share that a network takes for a training patient"
        ),
        "reid_sensitivity": Title(
            "known patients recognised", "", "by that network, of patients that it has never seen"
        ),
        "reid_copy_sensitivity": Title("altered copies recognised", "", "by that network, of held-out images"),
        "reid_accuracy": Title(
            "patients told apart", "", "that network's accuracy on pairs of held-out images; chance is 0.5"
        ),
        "reid_auroc": Title("patients told apart, AUROC", "", "the same without a threshold"),
    },
}
SHARES = {  # put in percent
    "precision", "recall", "coverage", "domain_coverage", "class_agreement", "class_agreement_ratio",
    "attribute_agreement", "utility_ratio", "utility_synthetic", "utility_both", "utility_real", "duplicate_share",
    "near_share", "reid_matches", "reid_sensitivity", "reid_copy_sensitivity", "reid_accuracy", "reid_auroc",
}  # fmt: skip
TITLES = {name: title for titles in QUESTIONS.values() for name, title in titles.items()}


def title_of(name: str) -> Title:
    """Of a figure, or of a figure of one class, of one attribute, and so on."""
    if name in TITLES:
        return TITLES[name]
    base = _base(name)
    if base is None:
        return Title(name.replace("_", " "))
    return TITLES[base]._replace(name=f"{TITLES[base].name}, {name.removeprefix(base)[1:].replace('_', ' ')}")


def _base(name: str) -> str | None:
    """The figure that this is one class's part of."""
    return max((known for known in TITLES if f"{name}_".startswith(f"{known}_")), key=len, default=None)


def titles_of(names: Sequence[str]) -> str:
    """Of several figures, in one line; of many, only their kinds."""
    shown = names if len(names) < 4 else dict.fromkeys(_base(name) or name for name in names)
    return ", ".join(title_of(name).name for name in shown)


def by_question(figures: Mapping[str, Measured]) -> dict[str, dict[str, Measured]]:
    """The measured figures under the questions that they answer; each is followed by its parts."""
    order, groups = list(TITLES), {}
    for question, titles in QUESTIONS.items():
        names = [name for name, figure in figures.items() if figure.value is not None and _base(name) in titles]
        names.sort(key=lambda name: (order.index(_base(name) or name), name not in TITLES))
        if names:
            groups[question] = {name: figures[name] for name in names}
    if other := {name: figure for name, figure in figures.items() if figure.value is not None and not _base(name)}:
        groups["What else was measured?"] = other
    return groups


def explanations(found: Mapping[str, Measured]) -> dict[str, Title]:
    """What the figures of a question say, under the first of each kind: those of one class say the same."""
    first: dict[str, str] = {}
    for name in found:
        if base := _base(name):
            first.setdefault(base, name)
    return {name: TITLES[base] for base, name in first.items()}


def put(name: str, value: float | None) -> str:
    """A value of a figure as people read it."""
    if value is None:
        return ""
    if _base(name) in SHARES:
        return f"{100 * value:.3g} %"
    return "0" if abs(value) < 5e-5 else f"{value:.4f}" if abs(value) < 0.001 else f"{value:.3g}"


def beside_floor(name: str, figure: Measured) -> str:
    """A value in words, beside what other real images reach."""
    value, floor, better = figure.value, figure.floor, title_of(name).better
    if value is None or floor is None:
        return ""
    if better == "lower" and value <= 1.05 * floor:
        return f"as low as other real images, {put(name, floor)}"
    if better == "lower" and floor > 0.02 * value:
        return f"{value / floor:.1f} times that of other real images, {put(name, floor)}"
    if better == "higher" and floor > 0:
        return f"{100 * value / floor:.0f} % of what other real images reach, {put(name, floor)}"
    return f"other real images: {put(name, floor)}"
