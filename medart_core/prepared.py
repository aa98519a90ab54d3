"""A prepared set on the disk: images split by patient, their captions, and a record of how it was made."""

import csv
import filecmp
import hashlib
import io
import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from medart_core.errors import UserError
from medart_core.images import open_image

FRACTIONS = {"train": 0.7, "val": 0.1, "test": 0.2}
RECORD = "split.json"
SIMPLE_CAPTIONS, CAPTIONS = "raw.csv", "metadata.csv"
COLUMNS = {  # `text` of CAPTIONS is to be overwritten by longer captions, the simple ones stay beside it
    SIMPLE_CAPTIONS: ("file_name", "text", "label"),
    CAPTIONS: ("file_name", "text", "simple_text", "label"),
}
IMAGE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))


class Picture(NamedTuple):
    """An image of a source: its name in the set to be, its class, what it must stay together with, and its bytes.

    `read` raises UserError if the source is damaged there.
    """

    file_name: str
    label: str
    group: str
    read: Callable[[], bytes]


def split_patients(labels_of_patient: Mapping[str, Iterable[str]], seed: int = 0) -> dict[str, str]:
    """Assign every patient (or other group) to one split, stratified by the set of labels that the patient has."""
    strata: dict[tuple[str, ...], list[str]] = {}
    for patient, labels in sorted(labels_of_patient.items()):
        strata.setdefault(tuple(sorted(labels)), []).append(patient)
    split = {}
    for labels in sorted(strata):
        patients = strata[labels]
        random.Random(f"{seed}:{'+'.join(labels)}").shuffle(patients)
        first = round(len(patients) * FRACTIONS["train"])
        second = round(len(patients) * (FRACTIONS["train"] + FRACTIONS["val"]))
        for place, patient in enumerate(patients):
            split[patient] = "train" if place < first else "val" if place < second else "test"
    return split


def is_there(target: Path, request: Mapping[str, Any]) -> bool:
    """Whether `target` holds the whole set that was asked for.

    Raises:
        UserError: if it holds a set that was made from something else or in another way.
    """
    try:
        record = json.loads((target / RECORD).read_text(encoding="utf-8"))
        made_by = {name: record[name] for name in request}
    except (OSError, ValueError, KeyError):
        return False
    changed = [f"{name} {made_by[name]!r}, not {value!r}" for name, value in request.items() if made_by[name] != value]
    if changed:
        raise UserError(
            f"{target} was made with {'; '.join(changed)}; move it away, or choose another --root or --name"
        )
    return all(_is_whole(target / split, sum(counts.values())) for split, counts in record["counts"].items())


def _is_whole(folder: Path, count: int) -> bool:
    try:
        with open(folder / SIMPLE_CAPTIONS, newline="", encoding="utf-8") as file:
            names = [row["file_name"] for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError):
        return False
    return len(names) == count and (folder / CAPTIONS).exists() and all((folder / name).is_file() for name in names)


def write(target: Path, pictures: Sequence[Picture], request: Mapping[str, Any], source_sha256: str | None) -> None:
    """Make the set in a folder beside `target`, which then takes the name as a whole, and say what is in it.

    `source_sha256` defaults to a sha256 over the names and the contents of all pictures.

    Raises:
        UserError: naming the image that does not decode, or the file that stands in the way.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as beside:
            record = _compose(Path(beside), pictures, request, source_sha256)
            _publish(Path(beside, "set"), target)
    except OSError as error:
        place = error.filename or target
        raise UserError(
            f"{place} cannot be written ({error.strerror}); mend that, or choose another --root"
        ) from error
    for split, count in record["counts"].items():
        classes = ", ".join(f"{number} {label}" for label, number in count.items())
        print(f"{target / split}: {sum(count.values())} images ({classes})")
    if empty := [split for split in FRACTIONS if split not in record["counts"]]:
        print(f"too few groups for {' and '.join(empty)}")
    if record["dropped_duplicates"]:
        print(f"{len(record['dropped_duplicates'])} byte-identical files were dropped, see {target / RECORD}")


def _compose(
    beside: Path, pictures: Sequence[Picture], request: Mapping[str, Any], source_sha256: str | None
) -> dict[str, Any]:
    """Make beside/set; returns its record."""
    unsplit, work = beside / "unsplit", beside / "set"
    kept, dropped, contents = _store(pictures, unsplit)
    labels: dict[str, set[str]] = {}
    for picture in kept:
        labels.setdefault(picture.group, set()).add(picture.label)
    groups = split_patients(labels, request["seed"])
    counts = {}
    for split in FRACTIONS:
        members = sorted((p for p in kept if groups[p.group] == split), key=lambda picture: picture.file_name)
        if members:
            counts[split] = dict(sorted(Counter(picture.label for picture in members).items()))
            _write_split(work / split, members, unsplit, request["caption"])
    record = {
        **request,
        "source_sha256": source_sha256 or contents,
        "fractions": FRACTIONS,
        "counts": counts,
        "dropped_duplicates": dropped,
        "groups": groups,
    }
    (work / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return record


def _store(pictures: Sequence[Picture], folder: Path) -> tuple[list[Picture], dict[str, str], str]:
    """Write each image that is new: returns the ones kept, those dropped with their twin's name, a sha256 of all."""
    first: dict[str, str] = {}
    kept, dropped, everything = [], {}, hashlib.sha256()
    for picture in tqdm(pictures, "preparing images"):
        content = picture.read()
        digest = hashlib.sha256(content).hexdigest()
        everything.update(f"{digest}  {picture.file_name}\n".encode())
        if digest in first:
            dropped[picture.file_name] = first[digest]
            continue
        open_image(io.BytesIO(content), picture.file_name)
        first[digest] = picture.file_name
        (folder / picture.file_name).parent.mkdir(parents=True, exist_ok=True)
        (folder / picture.file_name).write_bytes(content)
        kept.append(picture)
    return kept, dropped, everything.hexdigest()


def _write_split(folder: Path, members: Sequence[Picture], unsplit: Path, caption: str) -> None:
    for picture in members:
        (folder / picture.file_name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(unsplit / picture.file_name, folder / picture.file_name)
    rows = []
    for picture in members:
        simple = caption.replace("{label}", picture.label)
        rows.append({"file_name": picture.file_name, "text": simple, "simple_text": simple, "label": picture.label})
    for name, columns in COLUMNS.items():
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
            table.writeheader()
            table.writerows(rows)


def _publish(work: Path, target: Path) -> None:
    """Give `work` the name `target`, or fill up what is there; captions that are there stay as they are."""
    if not target.exists():
        work.rename(target)
        return
    ours = {path.relative_to(work) for path in work.rglob("*") if path.is_file()}
    for path in sorted(target.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.relative_to(target) not in ours:
            raise UserError(
                f"{path} is in the way, it is not of this set; move {target} away and run the command again"
            )
    for name in sorted(
        ours, key=lambda name: (name.name == RECORD, name)
    ):  # the record last: it says that all is there
        there = target / name
        if there.exists() and (name.name == CAPTIONS or filecmp.cmp(work / name, there, shallow=False)):
            continue
        there.parent.mkdir(parents=True, exist_ok=True)
        os.replace(work / name, there)
