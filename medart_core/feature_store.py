"""Images on disk as moments of the VAE's posterior: one array that is mapped into memory, labels, and an index.

`moments.npy` holds (N, 2, 2, C, h, w) fp16: of each image, then of its mirror image, mean and standard deviation
before the VAE's scaling; `labels.npy` the classes, (N,) int64; `features.json` how they were made; `manifest.json` the
sums of all of them, and comes last. The array is filled in groups of `GROUP` images cut by number, each encoded by
itself, so that its bytes do not depend on who made which group.
"""

import errno
import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medart_core import checkpoint
from medart_core.checkpoint import MANIFEST, TEMPORARY
from medart_core.errors import UserError
from medart_core.labelled_images import LabelledImages

GROUP = 8
FLUSHED = 32  # groups of a process that are noted as done together: a kill costs it at most so many
MOMENTS, LABELS, INDEX = "moments.npy", "labels.npy", "features.json"
PART, STARTED, DONE = f"{TEMPORARY}{MOMENTS}", f"{TEMPORARY}{INDEX}", f"{TEMPORARY}groups-"
SUMMED_BYTES = 2**28  # of a larger file only the size is compared at each start
OPTION = "--features-path"
KEPT = "what is done is kept"  # when the disk is full


# --- Making one ---


def begin(folder: Path, images: LabelledImages, facts: dict[str, Any], shape: Sequence[int]) -> bool:
    """Start or take up the extraction of `images` to moments of `shape`; returns whether there is anything to do.

    For one process, before any of them fills the store.

    Raises:
        UserError: if the folder holds something else, or features with other facts, or another process fills it.
    """
    checkpoint.take(folder, remedy=f"choose another {OPTION}")
    index = {**facts, "shape": list(shape), "class_names": images.class_names, "images_sha256": images.digest()}
    finished = (folder / MANIFEST).exists()
    for name, part in ((MOMENTS, PART), (INDEX, STARTED)):
        if (folder / name).exists() and not finished:  # killed while publishing
            os.replace(folder / name, folder / part)
    if finished or (folder / STARTED).exists():
        before = checkpoint.read_json(folder / (INDEX if finished else STARTED), OPTION)
        if changed := checkpoint.changes(before, index):
            raise UserError(f"{folder} holds features made otherwise ({'; '.join(changed)}); choose another {OPTION}")
        return not finished
    ours = (TEMPORARY, checkpoint.LOCK, LABELS)
    foreign = sorted(path.name for path in folder.iterdir() if not path.name.startswith(ours))
    if foreign:
        raise UserError(f"{folder} holds other things ({foreign[0]}, ...); choose another {OPTION}")
    with checkpoint.disk_faults(folder, KEPT):
        np.save(folder / LABELS, np.array(images.labels, dtype=np.int64))
        np.lib.format.open_memmap(folder / PART, mode="w+", dtype=np.float16, shape=tuple(shape)).flush()
        checkpoint.write_json(folder / STARTED, index)
    return True


class Extraction:
    """A store that has been begun; any number of processes fill it, and what was done before a kill is kept."""

    def __init__(self, folder: Path):
        self.folder = folder
        array = np.lib.format.open_memmap(folder / PART, mode="r")
        self.offset, self.row_bytes, self.num_rows = array.offset, array[:1].nbytes, len(array)
        # Written to by position and not through the map, whose pages two machines might both write back.
        self.file = os.open(folder / PART, os.O_WRONLY)
        self.journal = folder / f"{DONE}{os.getpid()}-{time.time_ns()}"
        self.written: list[int] = []

    def pending(self) -> list[int]:
        """The groups that no process has noted as done."""
        done: set[int] = set()
        for journal in self.folder.glob(f"{DONE}*"):
            lines = journal.read_text().splitlines(keepends=True)
            done.update(int(line) for line in lines if line.endswith("\n"))  # a kill may cut the last one short
        return [group for group in range(-(-self.num_rows // GROUP)) if group not in done]

    def write(self, group: int, moments: Tensor) -> None:
        """Put the moments of a group, (GROUP, 2, 2, C, h, w), to their place."""
        rows = moments[: self.num_rows - group * GROUP].to("cpu", torch.float16).contiguous().numpy()
        with checkpoint.disk_faults(self.folder, KEPT):
            written = os.pwrite(self.file, rows.tobytes(), self.offset + group * GROUP * self.row_bytes)
            if written < rows.nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.written.append(group)
        if len(self.written) == FLUSHED:
            self.flush()

    def flush(self) -> None:
        """Bring what was written to the disk, and then note that it is there."""
        with checkpoint.disk_faults(self.folder, KEPT):
            os.fsync(self.file)
            with open(self.journal, "a") as journal:
                journal.write("".join(f"{group}\n" for group in self.written))
        self.written = []

    def publish(self) -> None:
        """Give the whole store its names, with the manifest last; for one process, when all have flushed."""
        assert not self.pending()
        os.replace(self.folder / PART, self.folder / MOMENTS)
        os.replace(self.folder / STARTED, self.folder / INDEX)
        checkpoint.seal(self.folder / MANIFEST, [self.folder / name for name in (MOMENTS, LABELS, INDEX)])
        checkpoint.clear_leftovers(self.folder)


# --- Reading one ---


class FeatureStore:
    """Moments and classes of a whole store, whose array stays on the disk until it is read.

    Raises:
        UserError: if it is unfinished or damaged.
    """

    def __init__(self, folder: Path):
        if (folder / STARTED).exists():
            raise UserError(f"{folder} is not finished: run extract_features.py again, it goes on where it was")
        try:
            checkpoint.verify(folder, summed_bytes=SUMMED_BYTES)
        except UserError as error:
            raise UserError(f"{error}; remove {folder} and extract the features anew") from error
        self.folder, index = folder, checkpoint.read_json(folder / INDEX, OPTION)
        self.class_names: list[str] = index["class_names"]
        self.image_size: int = index["image_size"]
        self.vae, self.scaling_factor = index["vae"], index["scaling_factor"]
        self.moments = np.load(folder / MOMENTS, mmap_mode="r")
        self.labels = torch.from_numpy(np.load(folder / LABELS))
        self.latent_shape: tuple[int, int, int] = self.moments.shape[3:]

    def __len__(self) -> int:
        return len(self.moments)

    def digest(self) -> str:
        """The sha256 of the manifest, in which are those of all files."""
        return hashlib.sha256((self.folder / MANIFEST).read_bytes()).hexdigest()

    def batch(self, indices: Sequence[int], mirrored: Tensor) -> tuple[Tensor, Tensor]:
        """Moments (B, 2, C, h, w) fp16 of images or, where `mirrored`, of their mirror images; classes (B,) int64."""
        rows = np.asarray(indices)
        moments = self.moments[rows, mirrored.numpy().astype(np.int64)]
        return torch.from_numpy(moments), self.labels[rows]
