"""Cases for `dit.py`: keeping a thousand samples as an .npz, the plain way and ours.

The plain way leaves what it has written to the kernel, ours is on the disk before it has its name. So each side is
timed with and without fsync, which can take longer than all the rest of ours.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import dit_baseline as baseline
import numpy as np
import torch
from PIL import Image

from medart_core.many_samples import SampleStore

ROOT = Path(__file__).resolve().parents[1]


def cases(quick: bool, folder: Path) -> dict[str, Callable[[], object]]:
    """An archive of 256 px X-rays as they come from the sampler, in groups of 32; each side with fsync and without."""
    files = sorted((ROOT / "tests" / "data").glob("*.jpeg"))
    pictures = [np.asarray(Image.open(file).convert("RGB").resize((256, 256))) for file in files]
    images = np.stack([pictures[number % len(pictures)] for number in range(64 if quick else 1000)])
    values, table = torch.from_numpy(images), [{"label": number % 3} for number in range(len(images))]

    def ours(png: bool = False) -> Path:
        store = SampleStore(Path(tempfile.mkdtemp(dir=folder)), "samples", images.shape, png)
        store.begin({})
        for start in range(0, len(images), 32):
            rows = range(start, min(start + 32, len(images)))
            store.save([*rows], values[rows.start : rows.stop])
        store.flush()
        store.publish(table)
        return store.target

    def theirs(sync: bool, count: int = len(images)) -> Path:
        path = baseline.save_npz(folder, list(images[:count]))
        if sync:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        return path

    def without_fsync() -> None:
        with mock.patch.object(os, "fsync"):
            ours()

    for path in (ours(), theirs(True, 32)):
        found = np.load(path)["arr_0"]
        if not np.array_equal(found, images[: len(found)]):
            raise SystemExit(f"{path.name} holds other images")
    return {
        "baseline": lambda: theirs(False),
        "baseline, fsynced": lambda: theirs(True),
        "ours": ours,
        "ours, not fsynced": without_fsync,
        "ours, with PNG files": lambda: ours(png=True),
    }
