"""The report of an evaluation: report.json for programs, report.md for people."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medart_core.evaluation.measured import Measured

# What each figure is called, which direction is better, and what it says.
TITLES = {
    "fid": ("FID", "lower", "Frechet distance of Inception features; mostly bias at a few hundred images"),
    "kid": ("KID", "lower", "kernel distance of Inception features, unbiased; 0 for equal sets"),
    "inception_score": ("Inception score", "higher", "over ImageNet's classes; means little on medical images"),
    "precision": ("precision", "higher", "share of generated images among the real ones"),
    "recall": ("recall", "higher", "share of real images among the generated ones"),
    "density": ("density", "higher", "how thick generated images lie where real ones are"),
    "coverage": ("coverage", "higher", "share of real images with a generated one nearby"),
    "domain_frechet": ("domain Frechet distance", "lower", "the same distance for a classifier of this domain"),
    "domain_density": ("density, domain", "higher", "in that classifier's features"),
    "domain_coverage": ("coverage, domain", "higher", "in that classifier's features"),
    "colour_statistics_distance": ("colour distance", "lower", "of average channel means and deviations, [-1, 1]"),
    "chroma_error": ("chroma error", "lower", "difference of the average colourfulness, [-1, 1]"),
    "colour_histogram_distance": ("colour histogram distance", "lower", "earth mover's, mean of channels, [-1, 1]"),
    "class_agreement": ("agreement with the prompt", "higher", "share that a classifier of real images sees as asked"),
    "class_agreement_ratio": ("agreement over accuracy", "higher", "over that classifier's accuracy on real images"),
    "attribute_agreement": ("attributes as prompted", "higher", "share whose pixels show what the prompt says"),
    "utility_ratio": (
        "utility",
        "higher",
        "balanced accuracy of a classifier trained on generated over on real images",
    ),
    "utility_real": ("trained on real images", "", "that classifier's figures on held-out real images"),
    "utility_synthetic": ("trained on generated images", "higher", "figures on the same held-out real images"),
    "utility_both": ("trained on both", "higher", "figures on the same held-out real images"),
    "authpct": ("authentic images, %", "as floor", "farther from the training images than those are from each other"),
    "authpct_gap": (
        "authenticity gap, points",
        "near 0",
        "the same minus that against held-out images; below 0: copies",
    ),
    "nearest_distance": (
        "distance to training images",
        "as floor",
        "median to the nearest one, root mean square in [0, 1]",
    ),
    "near_share": ("near training images", "as floor", "share nearer than all but 1 % of held-out images"),
    "reid_matches": (
        "matches with training patients",
        "as floor",
        "share that a network takes for a training patient",
    ),
    "reid_sensitivity": ("known patients recognised", "", "by that network, of patients it has never seen"),
    "reid_accuracy": ("patients told apart", "", "that network's accuracy on pairs of held-out images; chance is 0.5"),
    "reid_auroc": ("patients told apart, AUROC", "", "the same without a threshold"),
    "duplicate_share": ("duplicates of training images", "as floor", "share by a perceptual hash"),
    "colour_diversity": ("colour diversity", "near 1", "variance of the images' mean colours over that of real ones"),
}

INTRODUCTION = (
    "**Not for diagnosis.** `real against real` is what other real images reach at the same number of images: no "
    "generator can be expected to do better. Images are counted as generated / real."
)


def write(folder: Path, figures: Mapping[str, Measured], run: Mapping[str, Any], pictures: Sequence[str] = ()) -> Path:
    """Write report.json and report.md, each at once; returns the latter's path.

    report.json has one key per figure, each with the fields of `Measured` and the seed, and `run` with the settings.
    """
    content = {"run": dict(run)}
    for name, figure in figures.items():
        content[name] = {field: _plain(value) for field, value in asdict(figure).items()} | {"seed": run["seed"]}
    _publish(folder / "report.json", json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    _publish(folder / "report.md", _markdown(figures, run, pictures))
    return folder / "report.md"


def table(figures: Mapping[str, Measured]) -> list[str]:
    """The measured figures as lines of a Markdown table."""
    lines = ["| figure | value | 95 % interval | real against real | images | better |", "|---|---|---|---|---|---|"]
    for name, figure in figures.items():
        if figure.value is not None:
            title, better, _ = _title(name)
            interval = f"{_number(figure.low)} to {_number(figure.high)}" if figure.low is not None else ""
            images = f"{figure.n_generated} / {figure.n_real}"
            cells = (title, _number(figure.value), interval, _number(figure.floor), images, better)
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _markdown(figures: Mapping[str, Measured], run: Mapping[str, Any], pictures: Sequence[str]) -> str:
    lines = [f"# {run['generated']} against {run['real']}", "", INTRODUCTION, "", *table(figures), ""]
    if absent := {name: figure for name, figure in figures.items() if figure.value is None}:
        lines += [
            "## Not measured",
            "",
            *(f"- {_title(name)[0]}: {figure.note}" for name, figure in absent.items()),
            "",
        ]
    lines += [f"![{name.removesuffix('.png')}]({name})\n" for name in pictures]
    lines += ["## What the figures say", ""]
    lines += [f"- {title}: {says}." for name, (title, _, says) in TITLES.items() if name in figures]
    if notes := sorted({figure.note for figure in figures.values() if figure.value is not None and figure.note}):
        lines += ["", "## Notes", "", *(f"- {note}." for note in notes)]
    lines += ["", "## How it was made", ""]
    made_with = sorted({(figure.extractor, figure.sha256) for figure in figures.values() if figure.extractor})
    lines += [f"- features: {name}, sha256 `{sha256}`" for name, sha256 in made_with]
    lines += [f"- {name.replace('_', ' ')}: {value}" for name, value in run.items()]
    return "\n".join(lines) + "\n"


def _title(name: str) -> tuple[str, str, str]:
    """Of a figure, or of a figure of one class."""
    if name in TITLES:
        return TITLES[name]
    base = max((known for known in TITLES if name.startswith(f"{known}_")), key=len, default=None)
    if base is None:
        return name.replace("_", " "), "", ""
    title, better, says = TITLES[base]
    return f"{title}, {name.removeprefix(base)[1:].replace('_', ' ')}", better, says


def _number(value: float | None) -> str:
    return "" if value is None else "0" if abs(value) < 1e-12 else f"{value:.4g}"


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _publish(file: Path, text: str) -> None:
    beside = file.with_name(f".{file.name}-{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)
