"""Images with a class each: a folder per class, or a prepared set whose table has a column of labels."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from medart_core.data import center_crop_adm, to_pixel_values
from medart_core.errors import UserError
from medart_core.images import open_image
from medart_core.metadata import METADATA_FILES, read_metadata
from medart_core.prepared import IMAGE_SUFFIXES, SIMPLE_CAPTIONS

ROOT = Path(__file__).resolve().parents[1]
TABLES = (SIMPLE_CAPTIONS, *METADATA_FILES)  # captions may have been overwritten, the simple ones keep their labels
SPLITS = {"train", "val", "valid", "validation", "test"}


@dataclass(frozen=True)
class LabelledImages:
    """Paths below `folder`, the class of each as a number, and the names of the classes by number."""

    folder: Path
    names: list[str]
    labels: list[int]
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def pixel_values(self, index: int, size: int) -> Tensor:
        """The middle square of an image, (3, size, size) float32 in [-1, 1]."""
        return to_pixel_values(center_crop_adm(open_image(self.folder / self.names[index]), size))

    def digest(self) -> str:
        """A sha256 of names, file sizes and classes: another one means other images."""
        lines = (
            f"{name}\t{(self.folder / name).stat().st_size}\t{self.class_names[label]}\n"
            for name, label in zip(self.names, self.labels, strict=True)
        )
        digest = hashlib.sha256()
        for line in lines:
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def find(folder: Path) -> LabelledImages:
    """The images of a prepared set in the order of its table, else those of class folders, sorted by class and path.

    Raises:
        UserError: if there is neither, or a row of the table is at fault.
    """
    if not folder.is_dir() and (ROOT / folder).is_dir():
        folder = ROOT / folder
    if not folder.is_dir():
        raise UserError(
            f"--data-path {folder} does not exist; give a folder of class folders, or make one: prepare.py"
        )
    if any((folder / table).is_file() for table in TABLES):
        pairs = read_metadata(folder, "label", "label", TABLES)
    else:
        pairs = _class_folders(folder)
    class_names = sorted({label for _, label in pairs})
    number = {label: place for place, label in enumerate(class_names)}
    names = [name for name, _ in pairs]
    return LabelledImages(folder, names, [number[label] for _, label in pairs], class_names)


def _class_folders(folder: Path) -> list[tuple[str, str]]:
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if classes and set(classes) <= SPLITS:
        raise UserError(f"{folder} is a set of splits; give one of them, such as --data-path {folder / classes[0]}")
    pairs = []
    for label in classes:
        found = [
            os.path.relpath(os.path.join(parent, name), folder)
            for parent, _, files in os.walk(folder / label, followlinks=True)
            for name in files
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        ]
        pairs += [(name, label) for name in sorted(found)]
    if not pairs:
        raise UserError(
            f"{folder} has no images in class folders; it needs one folder per class, such as normal/1.png"
        )
    return pairs


class ImageDataset(Dataset):
    """Pixels and classes of single images, by the keys (epoch, index) of `data.ShuffledBatches`."""

    def __init__(self, images: LabelledImages, image_size: int):
        self.images, self.image_size = images, image_size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        return self.images.pixel_values(key[1], self.image_size), self.images.labels[key[1]]


class ImageGroups(Dataset):
    """Pixels of images `size * g` to `size * g + size - 1` as group g: (size, 3, S, S), zeros after the last image."""

    def __init__(self, images: LabelledImages, image_size: int, size: int):
        self.images, self.image_size, self.size = images, image_size, size

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __getitem__(self, group: int) -> tuple[int, Tensor]:
        pixel_values = torch.zeros(self.size, 3, self.image_size, self.image_size)
        rows = range(len(self.images))[group * self.size : (group + 1) * self.size]
        for place, index in enumerate(rows):
            pixel_values[place] = self.images.pixel_values(index, self.image_size)
        return group, pixel_values
