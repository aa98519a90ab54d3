"""Many samples of one kind, made by many processes over many sittings: a folder of PNG files, and one .npz.

Of samples `<name>` there are `<name>/000000.png` and so on, `<name>.npz`, `<name>.csv` with what each shows, and
`<name>.json` with how they were made. What is in the making lies in a hidden folder beside them; nothing has its own
name before it is whole.
"""

import contextlib
import csv
import hashlib
import os
import shutil
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from medart_core import checkpoint
from medart_core.checkpoint import TEMPORARY
from medart_core.errors import UserError
from medart_core.image_npz import ImageNpz, rows_of

OPTION = "--sample-dir"
SAVING_THREADS = 4  # compressing a PNG takes longer than a fast sampler does for an image
IMPORTED = 64  # pictures that are read at a time


def runs(rows: Iterable[int], longest: int) -> list[range]:
    """Ascending numbers as ranges without gaps, none longer than `longest`."""
    found: list[range] = []
    for row in rows:
        if found and row == found[-1].stop and len(found[-1]) < longest:
            found[-1] = range(found[-1].start, row + 1)
        else:
            found.append(range(row, row + 1))
    return found


class SampleStore:
    """Where `shape[0]` samples go, (H, W, 3) each; with `png`, as files of their own, too."""

    def __init__(self, sample_dir: Path, name: str, shape: tuple[int, int, int, int], png: bool):
        self.folder, self.target = sample_dir / name, sample_dir / f"{name}.npz"
        self.record, self.work = sample_dir / f"{name}.json", sample_dir / f"{TEMPORARY}{name}"
        self.shape, self.png = shape, png
        self.npz = ImageNpz(self.work, shape)
        self.pool = ThreadPoolExecutor(SAVING_THREADS)
        self.pending: deque[Future] = deque()

    def begin(self, settings: Mapping[str, Any]) -> bool:
        """Start, or take up what an interrupted run has left; False if all is there. For one process, before the rest.

        Raises:
            UserError: if there are samples that were made with other `settings`, or more than are asked for without
                pictures, or another run is making them.
        """
        if self.record.is_file():
            before = checkpoint.read_json(self.record, OPTION)
            if changed := checkpoint.changes(before, settings):
                raise UserError(
                    f"{self.folder} has samples made otherwise ({'; '.join(changed)}); choose another {OPTION}"
                )
        elif self.folder.exists() or self.target.exists():
            raise UserError(f"{self.folder} or its .npz is of another program; choose another {OPTION}")
        checkpoint.take(self.work, remedy=f"choose another {OPTION}")
        if rows_of(self.target) == self.shape[0] and not self._missing_pictures():
            shutil.rmtree(self.work)
            return False
        if (there := rows_of(self.target)) > self.shape[0] and not self._picture(self.shape[0]).exists():
            shutil.rmtree(self.work)  # those beyond would be lost for good
            raise UserError(
                f"{self.target} has {there} images, {self.shape[0]} are asked for; "
                f"choose another {OPTION}, or remove it"
            )
        with self._disk_faults():
            checkpoint.write_json(self.record, dict(settings))
            if self.png:
                self.folder.mkdir(exist_ok=True)
            self.npz.begin()
            self._take_over()
        return True

    @contextlib.contextmanager
    def _disk_faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write in {self.folder.parent} ({error}); make room and run the same command again"
            ) from error

    def _picture(self, row: int) -> Path:
        return self.folder / f"{row:06d}.png"

    def _missing_pictures(self) -> set[int]:
        if not self.png:
            return set()
        names = {path.name for path in self.folder.glob("*.png")}
        return {row for row in range(self.shape[0]) if self._picture(row).name not in names}

    def _take_over(self) -> None:
        """What a finished run of another number has need not be made again; its archive stays until publication."""
        try:
            self.npz.take_over(self.target)
        except zipfile.BadZipFile as error:
            raise UserError(f"{self.target} is damaged ({error}); remove it to have its images made again") from error
        absent = self._missing_pictures()
        for rows in runs((row for row in self.npz.missing() if self.png and row not in absent), IMPORTED):
            self.npz.write(rows.start, torch.stack([self._read(row) for row in rows]))
        for row in sorted(absent.difference(self.npz.missing())):
            self._write_picture(row, self.npz.read(row))

    def _read(self, row: int) -> Tensor:
        try:
            with Image.open(self._picture(row)) as picture:
                return torch.from_numpy(np.array(picture.convert("RGB")))
        except OSError as error:
            raise UserError(
                f"{self._picture(row)} cannot be read ({error}); remove it to have it made again"
            ) from error

    def missing(self) -> set[int]:
        """The samples that have yet to be made."""
        return self._missing_pictures() | set(self.npz.missing())

    def save(self, rows: list[int], images: Tensor) -> None:
        """Keep samples `rows`, (n, H, W, 3) uint8, in the background; what fails there is raised by a later call."""
        self.pending.append(self.pool.submit(self._save, rows, images))
        while len(self.pending) > SAVING_THREADS:
            self.pending.popleft().result()

    def _save(self, rows: list[int], images: Tensor) -> None:
        with self._disk_faults():
            for row, image in zip(rows, images, strict=True) if self.png else ():
                self._write_picture(row, image)
            taken = 0
            for run in runs(rows, len(rows)):
                self.npz.write(run.start, images[taken : taken + len(run)])
                taken += len(run)

    def _write_picture(self, row: int, image: Tensor) -> None:
        part = self.work / self._picture(row).name
        Image.fromarray(image.numpy()).save(part)
        os.replace(part, self._picture(row))

    def flush(self) -> None:
        """Wait until everything is on the disk."""
        while self.pending:
            self.pending.popleft().result()

    def publish(self, table: Sequence[Mapping[str, Any]]) -> None:
        """Give the .npz its name, with `table` as .csv beside it; for one process, when all have flushed."""
        part = self.work / f"{TEMPORARY}table"
        with self._disk_faults():
            with open(part, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, ["file_name", *table[0]])
                writer.writeheader()
                writer.writerows({"file_name": self._picture(row).name, **facts} for row, facts in enumerate(table))
            os.replace(part, self.target.with_suffix(".csv"))
            self.npz.publish(self.target)
            shutil.rmtree(self.work)


def fingerprint(*models: nn.Module) -> str:
    """Tells models apart by the first values of all their parameters."""
    digest = hashlib.sha256()
    for model in models:
        for parameter in model.parameters():
            values = parameter.detach().flatten()[:64].cpu().contiguous()
            digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
