"""The captions of a folder of images: metadata.csv or metadata.jsonl, read with distrust."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medart_core.errors import UserError

METADATA_FILES = ("metadata.csv", "metadata.jsonl")


def raise_first(problems: Sequence[str]) -> None:
    """Raise a UserError with the first of the problems and the number of the others, if there are any."""
    if problems:
        raise UserError(problems[0] + (f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""))


def _read_rows(file: Path) -> tuple[list[str], list[tuple[int, dict[str, Any]]]]:
    """The columns of a metadata file, and its rows with the number of the line on which each ends."""
    try:
        if file.suffix == ".csv":
            with open(file, newline="", encoding="utf-8-sig") as stream:
                table = csv.DictReader(stream, strict=True)
                return list(table.fieldnames or ()), [(table.line_num, row) for row in table]
        lines = enumerate(file.read_text("utf-8-sig").split("\n"), start=1)
        rows = [(number, json.loads(line)) for number, line in lines if line.strip()]
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read ({error}); save it as UTF-8 with one row per image") from error
    except OSError as error:
        raise UserError(f"{file} cannot be opened ({error.strerror}); make it readable") from error
    if not all(isinstance(row, dict) for _, row in rows):
        raise UserError(
            f'{file} has lines that are no JSON objects; write lines such as {{"file_name": ..., "text": ...}}'
        )
    return list(rows[0][1]) if rows else [], rows


def _row_problem(row: dict[str, Any], folder: Path, caption_column: str, seen: dict[Path, int]) -> str | None:
    """What is wrong with a row of a metadata file, and its remedy."""
    name, caption = row.get("file_name"), row.get(caption_column)
    if None in row:
        return f"more fields than columns behind {name!r}; put captions with commas into double quotes"
    if not isinstance(name, str) or not name or "\0" in name:
        return f"file_name is {name!r}; give the image's path relative to {folder}"
    path = (folder / name).resolve()
    if Path(name).is_absolute() or not path.is_relative_to(folder.resolve()):
        return f"{name!r} leads out of {folder}; copy the image into the folder and give its relative path"
    if not os.path.isfile(path):  # unlike Path.is_file() it bears names that are too long
        return f"{name!r} does not exist in {folder}; correct the name or remove the row"
    if path in seen:
        return f"{name!r} was already in line {seen[path]}; keep one of the two"
    if not isinstance(caption, str) or not caption.strip():
        return f"the caption of {name!r} is empty; write one or remove the row"
    return None


def metadata_columns(folder: Path, files: Sequence[str] = METADATA_FILES) -> list[str]:
    """The columns of the first of `files` that the folder has; none if it has none of them."""
    file = next((folder / name for name in files if (folder / name).is_file()), None)
    return _read_rows(file)[0] if file else []


def read_metadata(
    folder: Path, caption_column: str = "text", files: Sequence[str] = METADATA_FILES
) -> list[tuple[str, str]]:
    """The (file_name, caption) pairs of a folder with metadata.csv or metadata.jsonl, in the file's order.

    `caption_column` may be another column, and `files` other tables, of which the first that is there is read.

    Raises:
        UserError: naming the file, the line and the remedy, for a missing column, a missing, doubled or escaping
            file_name, or an empty caption.
    """
    file = next((folder / name for name in files if (folder / name).is_file()), None)
    if file is None:
        raise UserError(
            f"{folder} has no metadata.csv; make a set with prepare.py, or write one with the columns file_name,text"
        )
    columns, rows = _read_rows(file)
    if not rows:
        raise UserError(f"{file} has no rows; it needs one per image, with the columns file_name,{caption_column}")
    for column in ("file_name", caption_column):
        if columns.count(column) != 1:
            what = "no column" if column not in columns else "more than one column"
            raise UserError(
                f"{file} has {what} {column!r} (there are: {', '.join(columns)}); rename one or use --caption_column"
            )
    seen: dict[Path, int] = {}
    pairs, problems = [], []
    for line, row in rows:
        problem = _row_problem(row, folder, caption_column, seen)
        if problem:
            problems.append(f"{file}, line {line}: {problem}")
        else:
            seen[(folder / row["file_name"]).resolve()] = line
            pairs.append((row["file_name"], row[caption_column]))
    raise_first(problems)
    return pairs
