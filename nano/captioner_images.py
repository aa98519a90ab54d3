"""The images that the bundled captioner learns from: four domains, each image varied, its attributes measured anew."""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from photographs import CIFAR_CLASSES, FLOWER_HOLD_OUT, cifar10, flowers
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from medart_core.attributes import MEASURES, Measured
from medart_core.images import open_image
from medart_core.prepared import SIMPLE_CAPTIONS

DATASET = Path(__file__).resolve().parents[1] / "dataset"
PREPARED = {"chest-xray": "chest-xray", "dermoscopy": "dermoscopy-patches", "histology": "histology"}
VARIANTS = {"chest-xray": 2, "dermoscopy": 2, "histology": 12, "photograph": 1}  # of each image, the first unchanged
RARE_VARIANTS = {"IHC": 40}  # there are ten tiles of it
PHOTOGRAPHS = 1500
SIDES = {"chest-xray": (160, 224, 224, 320), "dermoscopy": (32, 32, 64, 128, 224), "histology": (128, 128, 96, 224),
         "photograph": (32, 64, 128)}  # fmt: skip


class Sample(NamedTuple):
    """An image with the class that its data set gives it and what was measured on its pixels."""

    domain: str
    image: Image.Image
    label: str
    measured: Measured


def prepared(domain: str, split: str) -> Iterator[tuple[Image.Image, str]]:
    """Images and labels of a split of the prepared set of a domain."""
    folder = DATASET / PREPARED[domain] / split
    with open(folder / SIMPLE_CAPTIONS, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        yield open_image(folder / row["file_name"]), row["label"]


def photographs(rng: np.random.Generator) -> Iterator[tuple[Image.Image, str]]:
    """Photographs of CIFAR-10 and the flowers that no recipe holds out."""
    images, labels = cifar10("train")
    for index in rng.permutation(len(images))[:PHOTOGRAPHS]:
        yield Image.fromarray(images[index]), CIFAR_CLASSES[labels[index]]
    for index, image in enumerate(flowers()):
        if index % FLOWER_HOLD_OUT:
            yield Image.fromarray(image), "flower"


def vary(domain: str, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Crop, resize, mirror and recolour an image, so that all values of its attributes occur."""
    smallest = 0.9 if domain == "chest-xray" else 0.6
    width, height = (round(side * rng.uniform(smallest, 1)) for side in image.size)
    x, y = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
    side = int(rng.choice(SIDES[domain]))
    target = (side, max(16, round(side * height / width)))
    image = image.resize(target, Image.Resampling.BICUBIC, box=(x, y, x + width, y + height))
    if rng.random() < (0.1 if domain == "chest-xray" else 0.5):
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if domain in ("dermoscopy", "histology"):
        image = image.rotate(90 * int(rng.integers(4)), expand=True)
    values = np.asarray(image, dtype=np.float64) / 255
    values = values ** rng.uniform(0.8, 1.25)
    values = (values - 0.5) * rng.uniform(0.85, 1.1) + 0.5 + rng.uniform(-0.04, 0.04)
    if domain != "chest-xray":
        values = values * rng.uniform(0.96, 1.04, size=3)
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))


def training_samples(seed: int = 0) -> Iterator[Sample]:
    """All training images with their variants; the same seed gives the same pixels."""
    for number, domain in enumerate(MEASURES):
        rng = np.random.default_rng([seed, number])
        source = photographs(rng) if domain == "photograph" else prepared(domain, "train")
        for image, label in source:
            for variant in range(RARE_VARIANTS.get(label, VARIANTS[domain])):
                shown = vary(domain, image, rng) if variant else image
                measured = MEASURES[domain](shown)
                # The classes of patches and tiles are measured too, and must fit the pixels after recolouring.
                yield Sample(domain, shown, measured.get("colour") or measured.get("stain") or label, measured)
