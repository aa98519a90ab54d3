"""The report of an evaluation: report.json for programs, report.md for people (page.py makes report.html)."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medart_core.checkpoint import write_text
from medart_core.evaluation.catalogue import beside_floor, by_question, explanations, put, title_of, titles_of
from medart_core.evaluation.measured import Measured

INTRODUCTION = (
    "**Not for diagnosis.** `real against real` is what other real images reach at the same number of images: no "
    "generator can be expected to do better. Images are counted as generated / real."
)
INTERVALS = (
    "intervals are of 95 %: of distances, precision, coverage and colours from the spread over random halves of both "
    "sides (the delete-half jackknife; a bootstrap's copies would look like close neighbours); of shares Wilson's; of "
    "usefulness from resampled seeds and patients"
)


def write(folder: Path, figures: Mapping[str, Measured], run: Mapping[str, Any], pictures: Sequence[str] = ()) -> Path:
    """Write report.json and report.md, each at once; returns the latter's path.

    report.json has one key per figure, each with the fields of `Measured` and the seed, and `run` with the settings.
    """
    content = {"run": dict(run)}
    for name, figure in figures.items():
        content[name] = {field: _plain(value) for field, value in asdict(figure).items()} | {"seed": run["seed"]}
    write_text(folder / "report.json", json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(folder / "report.md", _markdown(figures, run, pictures))
    return folder / "report.md"


def in_short(figures: Mapping[str, Measured]) -> list[str]:
    """For each question its first figure, beside what real images reach, in aligned lines."""
    leading = [(question, *next(iter(found.items()))) for question, found in by_question(figures).items()]
    rows = [(q, f"{title_of(name).name} {put(name, found.value)}", beside_floor(name, found))
            for q, name, found in leading]  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(2)] if rows else []
    return ["  ".join([*map(str.ljust, row, widths), row[2]]).rstrip() for row in rows]


def table(figures: Mapping[str, Measured]) -> list[str]:
    """The measured figures as lines of a Markdown table."""
    lines = ["| figure | value | 95 % interval | real against real | images | better |", "|---|---|---|---|---|---|"]
    for name, figure in figures.items():
        interval = f"{put(name, figure.low)} to {put(name, figure.high)}" if figure.low is not None else ""
        images = f"{figure.n_generated} / {figure.n_real}"
        title, better, _ = title_of(name)
        cells = (title, put(name, figure.value), interval, put(name, figure.floor), images, better)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def missing(figures: Mapping[str, Measured]) -> list[str]:
    """What was not measured, and why; figures that lack the same thing in one line."""
    names_of: dict[str, list[str]] = {}
    for name, figure in figures.items():
        if figure.value is None:
            names_of.setdefault(figure.note, []).append(name)
    return [f"{titles_of(names)}: {why}" for why, names in names_of.items()]


def notes(figures: Mapping[str, Measured]) -> list[str]:
    """Remarks on measured figures; those with the same one in one line."""
    names_of: dict[str, list[str]] = {}
    for name, figure in figures.items():
        if figure.value is not None and figure.note:
            names_of.setdefault(figure.note, []).append(name)
    return [f"{titles_of(names)}: {note}" for note, names in names_of.items()]


def how_it_was_made(figures: Mapping[str, Measured], run: Mapping[str, Any]) -> list[str]:
    """Networks with their sha256, and the run's settings."""
    made_with = sorted({(figure.extractor, figure.sha256 or "") for figure in figures.values() if figure.extractor})
    lines = [f"features: {name}" + (f", sha256 {sha256}" if sha256.strip("0") else "") for name, sha256 in made_with]
    return [*lines, INTERVALS] + [f"{name.replace('_', ' ')}: {value}" for name, value in run.items()]


def _markdown(figures: Mapping[str, Measured], run: Mapping[str, Any], pictures: Sequence[str]) -> str:
    lines = [f"# {run['generated']} against {run['real']}", "", INTRODUCTION, ""]
    for question, found in by_question(figures).items():
        lines += [f"## {question}", "", *table(found), ""]
        lines += [*(f"- {title.name}: {title.says}" for title in explanations(found).values()), ""]
    lines += [f"![{name.removesuffix('.png')}]({name})\n" for name in pictures]
    sections = {"Not measured": missing(figures), "Notes": notes(figures)}
    sections |= {"How it was made": how_it_was_made(figures, run)}
    for heading, entries in sections.items():
        lines += [f"## {heading}", "", *(f"- {entry}" for entry in entries), ""] if entries else []
    return "\n".join(lines).rstrip() + "\n"


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
