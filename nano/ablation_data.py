"""Files of the ablation: the images that rows share, the table of the pictures that count, what tells data apart."""

import csv
import hashlib
import json
import shutil
import sys
from pathlib import Path
from statistics import median

from scripts import ROOT

sys.path.insert(0, str(ROOT))
from medart_core.sources import sha256_of


def copy_evenly(source: Path, target: Path, count: int | None) -> None:
    """Copy `count` images that are evenly spread over a prepared split, all by default, with their simple captions."""
    with open(source / "raw.csv", newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    if count:
        found = [found[round(i * (len(found) - 1) / (count - 1))] for i in range(count)]
    target.mkdir(parents=True, exist_ok=True)
    for row in found:
        shutil.copy(source / row["file_name"], target)
    write_table(target / "raw.csv", found)


def write_table(file: Path, found: list[dict[str, str]]) -> None:
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(found[0]))
        writer.writeheader()
        writer.writerows(found)


def labels_of(folder: Path) -> list[str]:
    """The class of every image of a prepared split."""
    with open(folder / "raw.csv", newline="", encoding="utf-8") as file:
        return [line["label"] for line in csv.DictReader(file)]


def balanced_numbers(labels: list[str], classes: list[str]) -> list[int]:
    """Of pictures whose classes come in turn, the first that have these labels, none of them twice."""
    taken = dict.fromkeys(classes, 0)
    numbers = []
    for label in labels:
        numbers.append(taken[label] * len(classes) + classes.index(label))
        taken[label] += 1
    return numbers


def list_samples(pictures: Path, numbers: list[int], labels: list[str] | None) -> None:
    """Name in metadata.csv the pictures that count, with the class that each was asked for, if one was."""
    found = [{"file_name": f"{number:06d}.png"} for number in numbers]
    for line, label in zip(found, labels or (), strict=False):
        line["label"] = label
    write_table(pictures / "metadata.csv", found)


def step_seconds(log: Path) -> dict[str, float]:
    """Median seconds of an ordinary step, and of one with HLDF if there was one, as medart.py has logged them."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    found = {name: [line[name] for line in lines if name in line] for name in ("sec_per_step", "sec_per_hldf_step")}
    return {name: round(median(seconds), 4) for name, seconds in found.items() if seconds}


def digest(folder: Path) -> str:
    """sha256 of the names and contents of all files below a folder but for hidden ones and the captions' journal."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name[0] != "."]
    lines = [f"{sha256_of(file)}  {file.relative_to(folder)}" for file in files if file.name != "captions.jsonl"]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
