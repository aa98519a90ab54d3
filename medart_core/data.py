"""Captioned images: found, checked before anything expensive starts, opened, cropped and drawn in a fixed order."""

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from medart_core.errors import UserError
from medart_core.images import open_image
from medart_core.metadata import raise_first, read_metadata
from medart_core.seeds import generator

MAX_ASPECT = 50  # a longer image would fill the memory once its short side is resized to the resolution
CROP, ORDER, SUBSET = 11, 12, 13  # names of the random streams


# --- Crops ---


def to_pixel_values(image: Image.Image) -> Tensor:
    """RGB image -> (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float().div_(127.5).sub_(1)


def center_crop_adm(image: Image.Image, size: int) -> Image.Image:
    """The middle square, as DiT's training images are cut (`center_crop_arr` of ADM, arXiv:2105.05233).

    Halved by averaging while its short side is at least twice `size`, then scaled to it bicubically.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


@dataclass(frozen=True)
class ImageTransform:
    """Resize so that the image covers `size`, crop to it, perhaps mirror, scale to [-1, 1].

    `size` is the side of a square, or (height, width), in pixels.
    """

    size: int | tuple[int, int]
    center_crop: bool = False
    random_flip: bool = False

    def __call__(self, image: Image.Image, draws: torch.Generator | None = None) -> Tensor:
        """RGB image -> (3, height, width) float32; crop and mirroring come from `draws`."""
        height, width = self.sides
        scale = max(width / image.width, height / image.height)
        resized = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        image = image.resize(resized, Image.Resampling.BILINEAR)  # antialiased when it shrinks
        free = torch.tensor([resized[0] - width, resized[1] - height])
        place = free // 2 if self.center_crop else (torch.rand(2, generator=draws) * (free + 1)).long()
        left, top = place.tolist()
        pixels = to_pixel_values(image.crop((left, top, left + width, top + height)))
        if self.random_flip and torch.rand((), generator=draws) < 0.5:
            pixels = pixels.flip(-1)
        return pixels

    @property
    def sides(self) -> tuple[int, int]:
        """(height, width)."""
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)

    def is_fixed(self, size: tuple[int, int]) -> bool:
        """Whether an upright image of this (width, height) looks the same each time."""
        height, width = self.sides
        return not self.random_flip and (self.center_crop or size[0] * height == size[1] * width)


# --- Examples: from a folder or the hub, checked ---


@dataclass(frozen=True)
class Example:
    """One image with its caption; `image` is a path, or opens an image that lies in a table."""

    image: Path | Callable[[], BinaryIO]
    caption: str
    name: str

    def open(self) -> Image.Image:
        """The image as `open_image` makes it."""
        return open_image(self.image if isinstance(self.image, Path) else self.image(), self.place)

    @property
    def place(self) -> str:
        """Where a person finds the image: its path, or its row."""
        return str(self.image) if isinstance(self.image, Path) else self.name


def _read_hub(name: str, caption_column: str, image_column: str, revision: str | None, cache_dir: str | None):
    import datasets

    try:
        table = datasets.load_dataset(name, split="train", revision=revision, cache_dir=cache_dir)
    except Exception as error:  # `datasets` raises many kinds, all of them for the user
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name} is no folder, and cannot be loaded as a data set of the hub ({reason}); "
            "check the name and the network, or download it and give its folder"
        ) from error
    for column in (caption_column, image_column):
        if column not in table.column_names:
            raise UserError(
                f"{name} has no column {column!r} (there are: {', '.join(table.column_names)}); "
                "use --caption_column and --image_column"
            )
    if not isinstance(table.features[image_column], datasets.Image):
        raise UserError(f"{name}: the column {image_column!r} holds no images; choose another with --image_column")
    captions = list(table[caption_column])
    names = [f"{name}[{row}]" for row in range(len(captions))]
    raise_first(
        [
            f"{place}: the caption is {caption!r}; choose another --caption_column"
            for place, caption in zip(names, captions, strict=True)
            if not isinstance(caption, str) or not caption.strip()
        ]
    )
    table = table.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    return [Example(partial(_cell, table, image_column, row), captions[row], place) for row, place in enumerate(names)]


def _cell(table: Any, column: str, row: int) -> BinaryIO:
    cell = table[row][column] or {"bytes": b"", "path": None}
    return io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else open(cell["path"], "rb")


def _problem(example: Example) -> str | None:
    try:
        width, height = example.open().size
    except UserError as error:
        return str(error)
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"{example.place} has {width} x {height} pixels, too long a shape; crop it or take it out of the data"
    return None


def load_examples(
    dataset_name: str,
    caption_column: str = "text",
    image_column: str = "image",
    revision: str | None = None,
    cache_dir: str | None = None,
    *,
    max_samples: int | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> list[Example]:
    """Captioned images of a folder or of a hub data set; every image is decoded once, so that no run dies of it later.

    Raises:
        UserError: naming the first fault that was found and how many there are.
    """
    folder = Path(dataset_name)
    if folder.is_dir():
        examples = [Example(folder / name, caption, name) for name, caption in read_metadata(folder, caption_column)]
    elif folder.is_absolute() or dataset_name.startswith(".") or dataset_name.count("/") > 1:
        raise UserError(
            f"the folder {folder} does not exist; check --dataset_name, or make the folder with prepare.py"
        )
    else:
        examples = _read_hub(dataset_name, caption_column, image_column, revision, cache_dir)
    if max_samples is not None and max_samples < len(examples):
        kept = torch.randperm(len(examples), generator=generator(seed, SUBSET))[:max_samples]
        examples = [examples[index] for index in sorted(kept.tolist())]
    with ThreadPoolExecutor() as pool:
        checks = tqdm(pool.map(_problem, examples), "checking images", len(examples), disable=not show_progress)
        raise_first([found for found in checks if found])
    return examples


# --- What the training loop draws ---


class CaptionDataset(Dataset):
    """Transformed images and captions, keyed by (epoch, index): an image depends on the seed and its key only."""

    def __init__(self, examples: Sequence[Example], transform: ImageTransform, seed: int):
        self.examples, self.transform, self.seed = examples, transform, seed

    def __len__(self) -> int:
        return len(self.examples)

    def pixel_values(self, key: tuple[int, int]) -> Tensor:
        """(3, H, W) float32 in [-1, 1]."""
        return self.transform(self.examples[key[1]].open(), generator(self.seed, CROP, *key))

    def sources(self, batch: dict[str, Any]) -> list[Example]:
        """What a batch was made of."""
        return [self.examples[index] for _, index in batch["keys"]]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return {"pixel_values": self.pixel_values(key), "caption": self.examples[key[1]].caption, "key": key}

    def is_fixed(self) -> bool:
        """Whether every image looks the same in every epoch, so that it can be encoded once."""
        if self.transform.center_crop:
            return not self.transform.random_flip
        return all(self.transform.is_fixed(example.open().size) for example in self.examples)


class ShuffledBatches(Sampler[list[tuple[int, int]]]):
    """An endless stream of batches of (epoch, index) keys: permutation after permutation, without gaps.

    Of global batch b, which takes positions b * B * P .. (b + 1) * B * P of the stream, process p gets its p-th B
    rows. Starting at `first_batch` gives what an uninterrupted stream gives from there on.
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        seed: int,
        first_batch: int = 0,
        rank: int = 0,
        num_processes: int = 1,
    ):
        self.num_examples, self.batch_size, self.seed, self.batch = num_examples, batch_size, seed, first_batch
        self.rank, self.num_processes = rank, num_processes

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        orders: dict[int, list[int]] = {}
        batch = self.batch
        while True:
            start = (batch * self.num_processes + self.rank) * self.batch_size
            keys = []
            for position in range(start, start + self.batch_size):
                epoch, place = divmod(position, self.num_examples)
                if epoch not in orders:
                    orders = {e: order for e, order in orders.items() if e >= epoch - 1}
                    shuffled = torch.randperm(self.num_examples, generator=generator(self.seed, ORDER, epoch))
                    orders[epoch] = shuffled.tolist()
                keys.append((epoch, orders[epoch][place]))
            yield keys
            batch += 1


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Batch of a `CaptionDataset` or `LatentDataset`: stacked tensors, and lists `captions` and `keys`."""
    batch: dict[str, Any] = {
        name: torch.stack([row[name] for row in rows]) for name in rows[0] if torch.is_tensor(rows[0][name])
    }
    return batch | {"captions": [row["caption"] for row in rows], "keys": [row["key"] for row in rows]}
