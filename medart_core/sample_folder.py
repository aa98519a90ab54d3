"""A folder of samples: pictures, the table that says how each was made, never written over."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from medart_core import checkpoint
from medart_core.errors import UserError

TABLE = "samples.csv"


def choose(out: Path | None, results: Path) -> Path:
    """`out`, or the next free sample-NNN in `results`. Raises UserError if it is a file, or holds samples."""
    if out is None:
        out = next(path for n in range(1, 10_000) if not (path := results / f"sample-{n:03d}").exists())
    if out.is_file():
        raise UserError(f"{out} is a file; choose another --out")
    if (out / TABLE).exists():
        raise UserError(f"{out} holds samples already; choose another --out, or remove it")
    return out


def write(folder: Path, images: Iterable[Tensor], rows: Sequence[Mapping[str, Any]]) -> list[Image.Image]:
    """Save (H, W, 3) uint8 images as they come, image n as <n>.png with row n of the table; returns them."""
    pictures = []
    with checkpoint.disk_faults(folder, "remove what is there"):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / TABLE, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, ["file_name", *rows[0]])
            table.writeheader()
            for number, (row, image) in enumerate(zip(rows, tqdm(images, "sampling", len(rows)), strict=True)):
                name = f"{number:06d}.png"
                pictures.append(Image.fromarray(image.numpy()))
                pictures[-1].save(folder / name)
                table.writerow({"file_name": name, **row})
    return pictures
