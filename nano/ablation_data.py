"""Files of the ablation: the images that rows share, the table of the pictures that count, what tells data apart."""

import csv
import hashlib
import shutil
import sys
from pathlib import Path

from ablation_rows import Row
from recipe import ROOT

sys.path.insert(0, str(ROOT))
from medart_core.metadata import NO_CAPTIONS
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


def label_samples(pictures: Path, prompts: Path, row: Row) -> None:
    """Name in metadata.csv the pictures that count, with the class that each was asked for, if one was.

    DiT's are balanced: of each class as many are taken as there are prompts.
    """
    with open(prompts / "raw.csv", newline="", encoding="utf-8") as file:
        labels = [line["label"] for line in csv.DictReader(file)]
    numbers = list(range(len(labels)))
    if row.name == "dit":
        classes, taken = sorted(set(labels)), dict.fromkeys(labels, 0)
        for number, label in enumerate(labels):
            numbers[number] = taken[label] * len(classes) + classes.index(label)
            taken[label] += 1
    found = [{"file_name": f"{number:06d}.png", "label": label} for number, label in zip(numbers, labels, strict=True)]
    if row.options.get("caption_column") == NO_CAPTIONS:
        found = [{"file_name": line["file_name"]} for line in found]
    write_table(pictures / "metadata.csv", found)


def digest(folder: Path) -> str:
    """sha256 of the names and contents of all files below a folder but for hidden ones and the captions' journal."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name[0] != "."]
    lines = [f"{sha256_of(file)}  {file.relative_to(folder)}" for file in files if file.name != "captions.jsonl"]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
