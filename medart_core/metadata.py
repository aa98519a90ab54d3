"""The captions of a folder of images: metadata.csv or metadata.jsonl, read with distrust."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medart_core.errors import UserError

METADATA_FILES = ("metadata.csv", "metadata.jsonl")
NO_CAPTIONS = "none"  # in place of a column: every caption is the empty one


def raise_first(problems: Sequence[str]) -> None:
    """Raise a UserError with the first of the problems and the number of the others, if there are any."""
    if problems:
        raise UserError(problems[0] + (f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""))


def read_rows(file: Path) -> tuple[list[str], list[tuple[int, dict[str, Any]]]]:
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


def _row_problem(row: dict[str, Any], folder: Path, column: str, what: str, seen: dict[Path, int]) -> str | None:
    """What is wrong with a row of a metadata file, and its remedy."""
    name, value = row.get("file_name"), row.get(column)
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
    if not isinstance(value, str) or not value.strip():
        return f"the {what} of {name!r} is empty; write one or remove the row"
    return None


def metadata_columns(folder: Path, files: Sequence[str] = METADATA_FILES) -> list[str]:
    """The columns of the first of `files` that the folder has; none if it has none of them."""
    file = next((folder / name for name in files if (folder / name).is_file()), None)
    return read_rows(file)[0] if file else []


def read_table(file: Path, column: str, remedy: str, what: str = "caption") -> list[tuple[int, dict[str, Any]]]:
    """The rows of a table of the images beside it, each with its line number, all of them usable.

    What stands in `column` is called `what` in messages.

    Raises:
        UserError: naming the file, the line and the remedy, for a missing column (`remedy`), a missing, doubled or
            escaping file_name, or an empty value.
    """
    columns, rows = read_rows(file)
    if not rows:
        raise UserError(f"{file} has no rows; it needs one per image, with the columns file_name,{column}")
    for name in ("file_name", column):
        if columns.count(name) != 1:
            fault = "no column" if name not in columns else "more than one column"
            if len(columns) == 1 and (other := next((sign for sign in ";\t" if sign in columns[0]), None)):
                remedy = f"save it with commas between the columns instead of {other!r}"
            raise UserError(f"{file} has {fault} {name!r} (there are: {', '.join(columns)}); {remedy}")
    seen: dict[Path, int] = {}
    problems = []
    for line, row in rows:
        problem = _row_problem(row, file.parent, column, what, seen)
        if problem:
            problems.append(f"{file}, line {line}: {problem}")
        else:
            seen[(file.parent / row["file_name"]).resolve()] = line
    raise_first(problems)
    return rows


def read_metadata(
    folder: Path, column: str = "text", what: str = "caption", files: Sequence[str] = METADATA_FILES
) -> list[tuple[str, str]]:
    """The (file_name, caption) pairs of a folder's table, in its order; the first of `files` that is there counts.

    With another `column`, what is read and called `what` in messages may also be a label; with `NO_CAPTIONS` every
    image has the empty caption.

    Raises:
        UserError: if there is no table, or as `read_table` does.
    """
    file = next((folder / name for name in files if (folder / name).is_file()), None)
    if file is None:
        raise UserError(
            f"{folder} has no metadata.csv; make a set with prepare.py, or write one with the columns file_name,text"
        )
    if column == NO_CAPTIONS:
        return [(row["file_name"], "") for _, row in read_table(file, "file_name", "rename one", "file_name")]
    remedy = "rename one or use --caption_column" if what == "caption" else "rename one"
    return [(row["file_name"], row[column]) for _, row in read_table(file, column, remedy, what)]
