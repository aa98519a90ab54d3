"""A journal of long work that is done in chunks: JSON lines, appended as they come, of which only whole chunks count.

The first line says what the journal was made with, then follows a line for every item of every chunk, and a last line
once all is done. Of several processes the first one writes to the journal itself, each other one to a part beside it.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medart_core.checkpoint import write_text
from medart_core.errors import UserError

HEADER, END = "journal", "finished"  # the keys that tell the first and the last line from an item's
Item = dict[str, Any]


@dataclass
class Journal:
    """What stands in the journal at `path`; `items` holds the whole chunks by number.

    `names` are the `file_name`s of each chunk in order: a chunk is whole when it has a line for each of them.
    """

    path: Path
    names: Sequence[Sequence[str]]
    header: dict[str, Any] = field(default_factory=dict)
    items: dict[int, list[Item]] = field(default_factory=dict)
    finished: bool = False

    @classmethod
    def read(cls, path: Path, names: Sequence[Sequence[str]]) -> "Journal":
        """Read what is there; a line that a kill has cut short, and with it its chunk, is passed over.

        Raises:
            UserError: if the file is none of ours.
        """
        journal = cls(path, names)
        lines = _whole_lines(path)
        first = next(lines, None)
        if first is not None and not isinstance(first.get(HEADER), dict):
            raise UserError(f"{path} is no journal of this program; move it away")
        journal.header = first[HEADER] if first else {}
        found: dict[int, list[Item]] = {}
        for line in lines:
            if END in line:
                journal.finished = True
            elif isinstance(line.get("chunk"), int):
                found.setdefault(line["chunk"], []).append(line)
        for chunk, items in sorted(found.items()):
            whole = 0 <= chunk < len(names) and [item.get("file_name") for item in items] == list(names[chunk])
            if whole:
                journal.items[chunk] = items
        return journal

    def part(self, rank: int) -> Path:
        """The file that the process `rank` appends to."""
        return self.path.with_name(f".{self.path.stem}-{rank}{self.path.suffix}") if rank else self.path

    def parts(self) -> list[Path]:
        """The files of the processes beside the first one."""
        return sorted(self.path.parent.glob(f".{self.path.stem}-*{self.path.suffix}"))

    def take_in_parts(self) -> None:
        """Add the whole chunks of the other processes' parts that were made with the same header."""
        for path in self.parts():
            part = Journal.read(path, self.names)
            if part.header == self.header:
                self.items = part.items | self.items

    def publish(self) -> None:
        """Replace the journal by its whole chunks in order, the parts' among them, and remove the parts."""
        self.take_in_parts()
        lines: list[Item] = [{HEADER: self.header}]
        for chunk in sorted(self.items):
            lines += self.items[chunk]
        if self.finished:
            lines.append({END: True})
        write_text(self.path, "".join(map(_line, lines)))
        for path in self.parts():
            path.unlink()

    def append(self, items: Sequence[Item], rank: int = 0) -> None:
        """Add one chunk to the file of this process, and see it onto the disk."""
        path = self.part(rank)
        with open(path, "ab") as file:
            if not file.tell():
                file.write(_line({HEADER: self.header}).encode())
            file.write("".join(map(_line, items)).encode())
            file.flush()
            os.fsync(file.fileno())
        self.items[items[0]["chunk"]] = list(items)

    def by_name(self) -> dict[str, Item]:
        """The items by `file_name`."""
        return {item["file_name"]: item for items in self.items.values() for item in items}


def begin(
    path: Path,
    names: Sequence[Sequence[str]],
    options: Mapping[str, Any],
    wanted: Iterable[int],
    overwrite: bool = False,
) -> Journal:
    """Go on with the journal at `path`, or start it anew: where there is none, or by `overwrite`.

    `wanted` are the chunks to be done: a finished journal that lacks one of them is unfinished again. An unfinished
    journal that was itself begun by `overwrite` goes on, so that the same command may follow a kill.

    Raises:
        UserError: naming the options that differ from those that the journal was made with.
    """
    options = json.loads(json.dumps(dict(options)))  # as they will be read back
    journal = Journal.read(path, names)
    before = journal.header.get("options", options)
    changed = [
        f"{name} {before.get(name)!r} -> {options.get(name)!r}"
        for name in sorted(before.keys() | options.keys())
        if before.get(name) != options.get(name)
    ]
    # Items are looked for line by line: cut into other chunks, none may be whole.
    if changed and not overwrite and (journal.parts() or any("chunk" in line for line in _whole_lines(path))):
        raise UserError(
            f"{path} was made with other options ({'; '.join(changed)}); give those to go on, "
            "or --overwrite to start anew"
        )
    again = overwrite and (journal.finished or not journal.header.get("overwrite"))
    if not journal.header or changed or again:
        for part in journal.parts():
            part.unlink()
        journal = Journal(path, names, {"options": options, "overwrite": overwrite})
    elif journal.finished and not journal.items.keys() >= set(wanted):
        journal.header |= {"overwrite": False, "written": sorted(journal.items)}
        journal.finished = False
    if not journal.finished or journal.parts():  # a kill may come between the last line and the end of the parts
        journal.publish()
    return journal


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(content) + "\n"  # ASCII: no line end of any kind inside


def _whole_lines(path: Path) -> Iterator[Item]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); make it readable") from error
    for line in lines[:-1]:
        try:
            content = json.loads(line)
        except ValueError:
            content = None
        if isinstance(content, dict):
            yield content
