"""Sets that a user has on disk: Kvasir, ISIC 2017, HAM10000, or any tree with a folder per class."""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from medart_core.errors import UserError
from medart_core.image_files import Files, files_of, images_of, read_file
from medart_core.images import open_image
from medart_core.near_duplicates import cluster
from medart_core.prepared import Picture

Row = dict[str, str]

KVASIR_CLASSES = (
    "dyed-lifted-polyps",
    "dyed-resection-margins",
    "esophagitis",
    "normal-cecum",
    "normal-pylorus",
    "normal-z-line",
    "polyps",
    "ulcerative-colitis",
)
ISIC_COLUMNS = ("image_id", "melanoma", "seborrheic_keratosis")
ISIC_LABELS = {(1, 0): "melanoma", (0, 1): "seborrheic keratosis", (0, 0): "nevus"}
HAM_TABLE = "HAM10000_metadata"
HAM_COLUMNS = ("lesion_id", "image_id", "dx")
HAM_LABELS = {
    "akiec": "actinic keratosis",
    "bcc": "basal cell carcinoma",
    "bkl": "benign keratosis",
    "df": "dermatofibroma",
    "mel": "melanoma",
    "nv": "melanocytic nevus",
    "vasc": "vascular lesion",
}
GLANCE = 64  # pixels each way that suffice for a perceptual hash


# --- A folder per class ---


def class_folder(path: Path, group_pattern: str | None) -> list[Picture]:
    """Images of a folder or zip with one folder per class (below any folder that holds all of them)."""
    pictures = _with_a_folder_per_class(path)
    if group_pattern is None:
        print("no --group-pattern: every file counts as a patient of its own")
        return pictures
    return [picture._replace(group=_group(picture.file_name, group_pattern)) for picture in pictures]


def kvasir(path: Path) -> list[Picture]:
    """Endoscopic frames of Kvasir v2; near-identical ones, which repeat a scene, are one group."""
    pictures = _with_a_folder_per_class(path)
    there = {PurePosixPath(picture.file_name).parts[0] for picture in pictures}
    if there != set(KVASIR_CLASSES):
        missing = ", ".join(sorted(set(KVASIR_CLASSES) - there)) or "none"
        unknown = ", ".join(sorted(there - set(KVASIR_CLASSES))) or "none"
        raise UserError(f"{path} is not Kvasir v2; classes that are missing: {missing}, unknown: {unknown}")
    glances = (open_image(io.BytesIO(p.read()), p.file_name, rough=GLANCE) for p in tqdm(pictures, "comparing images"))
    numbers = cluster(glances)
    largest = max(Counter(numbers).values())
    print(f"{len(pictures)} images form {max(numbers) + 1} clusters of near duplicates, the largest has {largest}")
    first: dict[int, str] = {}
    groups = [first.setdefault(number, p.file_name) for p, number in zip(pictures, numbers, strict=True)]
    labels = [p.label.replace("z line", "z-line") for p in pictures]  # the one hyphen that is no space
    return [p._replace(group=g, label=name) for p, g, name in zip(pictures, groups, labels, strict=True)]


def _with_a_folder_per_class(path: Path) -> list[Picture]:
    files = images_of(files_of(path))
    wrapped = all(len(name.parts) > 2 for name in files)
    while files and wrapped and len({name.parts[0] for name in files}) == 1:
        files = {PurePosixPath(*name.parts[1:]): read for name, read in files.items()}
        wrapped = all(len(name.parts) > 2 for name in files)
    flat = next((name for name in files if len(name.parts) == 1), None)
    if flat or not files:
        what = f"{flat} lies in no class folder" if flat else "no images"
        raise UserError(f"{path}: {what}; give a folder or zip with one folder per class, such as normal/1.png")
    if {name.parts[0] for name in files} <= {"train", "val", "valid", "validation", "test"}:
        raise UserError(f"{path} is split already; give one of its parts, or put the images into one folder per class")
    label = {name: re.sub("[-_]", " ", name.parts[0]).strip() for name in files}
    return [Picture(str(name), label[name], str(name), read) for name, read in files.items()]


def _group(file_name: str, pattern: str) -> str:
    found = re.search(pattern, PurePosixPath(file_name).name)
    group = found and found[min(1, found.re.groups)]
    if not group:
        raise UserError(f"--group-pattern {pattern} finds nothing in {file_name}; widen it, every file needs a group")
    return group


# --- A table of images ---


def isic(path: Path, table: Path | None = None) -> list[Picture]:
    """Dermoscopic images of ISIC 2017, labelled by the ground truth of task 3; `table` lies in `path` by default."""
    files = files_of(path)
    where = {PurePosixPath(table): partial(table.open, "rb")} if table else files
    rows = _rows(where, ISIC_COLUMNS)
    if not rows:
        raise UserError(f"{table or path} has no table with the columns {', '.join(ISIC_COLUMNS)}; give it with --csv")
    print("the table names no lesion: every image counts as a patient of its own, but a lesion may cross the split")
    return _listed(path, files, rows, _isic_label, lambda row: row["image_id"])


def _isic_label(row: Row) -> str:
    return ISIC_LABELS[int(float(row["melanoma"])), int(float(row["seborrheic_keratosis"]))]


def ham10000(path: Path) -> list[Picture]:
    """Dermoscopic images of HAM10000; several of them may show one lesion, which is the group."""
    files = files_of(path)
    rows = _rows({name: opener for name, opener in files.items() if name.stem == HAM_TABLE}, HAM_COLUMNS)
    if not rows:
        raise UserError(f"{path} has no {HAM_TABLE}.csv with the columns {', '.join(HAM_COLUMNS)}; put it there")
    return _listed(path, files, rows, lambda row: HAM_LABELS[row["dx"]], lambda row: row["lesion_id"])


def _rows(files: Files, columns: Iterable[str]) -> list[Row]:
    """The rows of all tables among the files that have these columns, without blanks; an image's last row counts."""
    rows = {}
    for name, opener in files.items():
        if name.suffix.lower() in ("", ".csv", ".tab"):
            lines = read_file(name, opener).decode("utf-8-sig", errors="replace").splitlines()
            table = csv.DictReader(lines, delimiter="\t" if lines and "\t" in lines[0] else ",")
            if set(columns) <= set(table.fieldnames or ()):
                for row in table:
                    rows[row["image_id"]] = {column: (row[column] or "").strip() for column in columns}
    return list(rows.values())


def _listed(
    path: Path, files: Files, rows: list[Row], label: Callable[[Row], str], group: Callable[[Row], str]
) -> list[Picture]:
    """The images that the rows name, in one folder; others, such as masks and superpixels, have names of their own.

    An image may be there twice, as in HAM10000 downloads with both `part_1` and `PART_1`: the first counts.
    """
    by_id: dict[str, tuple[str, Callable[[], bytes]]] = {}
    for name, read in images_of(files).items():
        by_id.setdefault(name.stem, (name.name, read))
    missing = [row["image_id"] for row in rows if row["image_id"] not in by_id]
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} of the {len(rows)} images of its table, such as {missing[0]}; add them, "
            "and unpack archives that lie inside"
        )
    pictures = []
    for row in rows:
        file_name, read = by_id[row["image_id"]]
        try:
            pictures.append(Picture(file_name, label(row), group(row), read))
        except (KeyError, ValueError) as error:
            raise UserError(f"{path}: the table gives {row['image_id']} no known class ({row}); mend it") from error
    return pictures
