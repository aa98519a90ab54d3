"""From simple captions to descriptions: the images of a split in chunks, what came of each, and its metadata.csv."""

import csv
import hashlib
import io
import json
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from medart_core.checkpoint import disk_faults, take, write_text
from medart_core.errors import UserError
from medart_core.images import open_image
from medart_core.journal import Item, Journal, begin
from medart_core.metadata import METADATA_FILES, raise_first, read_rows, read_table
from medart_core.prepared import CAPTIONS, COLUMNS, FRACTIONS, SIMPLE_CAPTIONS

JOURNAL = "captions.jsonl"
ACCEPTED, SHORTENED, FALLEN_BACK, UNREADABLE = "accepted", "shortened", "fallen back", "unreadable"
AHEAD = 2  # chunks that are made ready while the model works
Job = TypeVar("Job")
Done = TypeVar("Done")


@dataclass(frozen=True)
class Row:
    """One image of raw.csv: its name, its simple caption, and its class if the file has a column for it."""

    file_name: str
    caption: str
    label: str | None


@dataclass(frozen=True)
class Split:
    """A folder with raw.csv; `chunks` are cuts of its rows, sorted by name: they are the units of work and restart."""

    folder: Path
    rows: Sequence[Row]
    chunks: Sequence[Sequence[Row]]

    @property
    def names(self) -> list[list[str]]:
        """The file names of each chunk."""
        return [[row.file_name for row in chunk] for chunk in self.chunks]

    def wanted(self, max_images: int | None) -> list[int]:
        """The numbers of all chunks, or of as many, evenly spread, as it takes for `max_images`."""
        count = len(self.chunks)
        size = len(self.chunks[0])
        some = count if max_images is None else min(count, -(-max_images // size))
        return [place * count // some for place in range(some)]

    def digest(self) -> str:
        """The first digits of the sha256 of what raw.csv says."""
        facts = sorted((row.file_name, row.caption, row.label or "") for row in self.rows)
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


# --- What there is to describe ---


def read_splits(data_dir: Path, chunk_size: int) -> list[Split]:
    """The split at `data_dir`, or the splits below it, the training split first.

    Raises:
        UserError: naming the first fault of a raw.csv and how many there are, or if there is none.
    """
    if not data_dir.is_dir():
        raise UserError(f"the folder {data_dir} does not exist; check --data-dir, or make the folder with prepare.py")
    folders = [data_dir] if (data_dir / SIMPLE_CAPTIONS).is_file() else _folders_below(data_dir)
    if not folders:
        lacking = f"has no {SIMPLE_CAPTIONS}, nor has a folder in it" if data_dir.is_dir() else "is no folder"
        raise UserError(
            f"{data_dir} {lacking}; make a set with prepare.py, or write {SIMPLE_CAPTIONS} with the columns "
            "file_name,text,label beside the images"
        )
    splits = []
    for folder in folders:
        rows = _read_rows(folder)
        ordered = sorted(rows, key=lambda row: row.file_name)
        chunks = [ordered[start : start + chunk_size] for start in range(0, len(ordered), chunk_size)]
        splits.append(Split(folder, rows, chunks))
    return splits


def _folders_below(data_dir: Path) -> list[Path]:
    known = list(FRACTIONS)
    found = [path.parent for path in data_dir.glob(f"*/{SIMPLE_CAPTIONS}")]
    return sorted(found, key=lambda path: (known.index(path.name) if path.name in known else len(known), path.name))


def _read_rows(folder: Path) -> list[Row]:
    file = folder / SIMPLE_CAPTIONS
    table = read_table(file, "text", "give it the columns file_name,text,label")
    raise_first(
        [
            f"{file}, line {line}: the label of {row['file_name']!r} is empty; write its class, or drop the column"
            for line, row in table
            if "label" in row and not (row["label"] or "").strip()
        ]
    )
    if (folder / METADATA_FILES[1]).exists():
        raise UserError(f"{folder} has a {METADATA_FILES[1]}, beside which no {CAPTIONS} may stand; move it away")
    return [Row(row["file_name"], row["text"], row.get("label")) for _, row in table]


def open_or_fault(path: Path) -> Image.Image | str:
    """The image, or what is wrong with it."""
    try:
        return open_image(path)
    except UserError as error:
        return str(error)


def in_advance(function: Callable[[Job], Done], jobs: Sequence[Job]) -> Iterator[tuple[Job, Done]]:
    """Each job with what `function` makes of it, in a thread that is a few jobs ahead of the caller."""
    thread = ThreadPoolExecutor(1, "in-advance")
    try:
        waiting = deque((job, thread.submit(function, job)) for job in jobs[:AHEAD])
        for following in [*jobs[AHEAD:], *[None] * min(AHEAD, len(jobs))]:
            job, future = waiting.popleft()
            done = future.result()
            if following is not None:
                waiting.append((following, thread.submit(function, following)))
            yield job, done
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


# --- What has come of it ---


@dataclass
class Described:
    """One image while its chunk is worked on; `text` is None until a caption is settled."""

    row: Row
    label: str
    image: Image.Image | str
    attempts: list[dict[str, Any]] = field(default_factory=list)
    outcome: str = UNREADABLE
    text: str | None = None

    @property
    def readable(self) -> bool:
        """Whether there is an image, and not only what is wrong with it."""
        return not isinstance(self.image, str)

    def settle(self, outcome: str, text: str) -> None:
        """Give the image its caption."""
        self.outcome, self.text = outcome, text

    def item(self, chunk: int, **facts: Any) -> Item:
        """What the journal keeps of it; `reasons` say why attempts were rejected, each once, or why there was none."""
        failed = [name for attempt in self.attempts for name in attempt["failed"]]
        reasons = list(dict.fromkeys(failed)) if self.readable else [self.image]
        return {
            "file_name": self.row.file_name, "chunk": chunk, "outcome": self.outcome, "text": self.text,
            "reasons": reasons, "attempts": self.attempts, **facts,
        }  # fmt: skip


def clean_text(text: str) -> str:
    """What a model has said, fit to be written as UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def metadata(split: Split, journal: Journal, labels: Mapping[str, str], replace: bool) -> tuple[str, int]:
    """The content of metadata.csv, and how many captions in it are a person's: unless `replace`, those stay.

    Images that cannot be read are left out, those without an item have their simple caption.
    """
    items = journal.by_name()
    of_person = {} if replace else captions_of_person(split, items, journal.header.get("written", ()))
    rows = []
    for row in split.rows:
        item = items.get(row.file_name)
        if not item or item["outcome"] != UNREADABLE:
            written = item["text"] if item else row.caption
            text = of_person.get(row.file_name, written)
            rows.append([row.file_name, text, row.caption, labels[row.file_name]])
    return _as_csv(COLUMNS[CAPTIONS], rows), len(of_person)


def captions_of_person(split: Split, items: Mapping[str, Item], written: Container[int] = ()) -> dict[str, str]:
    """Those captions in metadata.csv that are neither in the journal nor, but for the chunks `written`, simple ones.

    Where a description was written, the simple caption is what a person has put back.
    """
    there, found = _captions_there(split.folder), {}
    for row in split.rows:
        text, simple = there.get(row.file_name, (None, None))
        item = items.get(row.file_name)
        ours = [item["text"]] if item and item["chunk"] in written else [simple, row.caption, item and item["text"]]
        if text not in (None, *ours):
            found[row.file_name] = text
    return found


def _captions_there(folder: Path) -> dict[str, tuple[str, str | None]]:
    """The caption and the simple caption of each image in the metadata.csv that is there."""
    file = folder / CAPTIONS
    if not file.is_file():
        return {}
    columns, rows = read_rows(file)
    if not {"file_name", "text"} <= set(columns):
        raise UserError(
            f"{file} lacks the columns file_name,text; rename or add them (commas between), or move it away"
        )
    named = [row for _, row in rows if row["file_name"] and (row["text"] or "").strip()]
    return {row["file_name"]: (row["text"], row.get("simple_text")) for row in named}


def _as_csv(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO(newline="")
    # Python 3.11 leaves a lone carriage return unquoted, and every reader takes it for the end of the row.
    plain = csv.writer(text, lineterminator="\n")
    quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for row in [columns, *rows]:
        (quoted if any("\r" in cell for cell in row) else plain).writerow(row)
    return text.getvalue()


def open_journal(
    split: Split, settings: Mapping[str, Any], max_images: int | None, overwrite: bool, owner: bool
) -> Journal:
    """The journal of a split; of several processes one is the `owner`, who locks and begins it before the others read.

    Raises:
        UserError: if another VSG works there, if the journal was made with other settings, or if there is nothing to
            describe.
    """
    path = split.folder / JOURNAL
    if not owner:
        return Journal.read(path, split.names)
    if not overwrite and len(captions_of_person(split, {})) == len(split.rows) and not path.exists():
        raise UserError(
            f"{split.folder / CAPTIONS} has longer captions for all images already; to replace them add --overwrite"
        )
    with disk_faults(split.folder, "nothing is lost"):
        take(split.folder, work="describes images", remedy="describe a copy of the folder")
        return begin(path, split.names, {**settings, "raw.csv": split.digest()}, split.wanted(max_images), overwrite)


def write_metadata(split: Split, journal: Journal, labels: Mapping[str, str]) -> str:
    """Replace metadata.csv, unless that has been done, and mark the journal as finished; returns a line for people."""
    file = split.folder / CAPTIONS
    if journal.finished and file.is_file():
        return f"{split.folder} is described already"
    replace = journal.header["overwrite"] and not journal.finished
    content, kept = metadata(split, journal, labels, replace)
    if content.count("\n") == 1:
        raise UserError(f"no image of {split.folder} can be read, see {JOURNAL}; mend them and add --overwrite")
    write_text(file, content)
    journal.finished = True
    journal.publish()
    return f"{file} is written" + (f"; {kept} captions of a person in it are kept (see --overwrite)" if kept else "")
