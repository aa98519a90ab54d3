"""A set of images to be measured: a folder, a zip of class folders, or a .npz of samples, with their classes."""

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from medart_core.data import ImageTransform
from medart_core.errors import UserError
from medart_core.evaluation import npz
from medart_core.image_files import files_of, images_of
from medart_core.images import open_image
from medart_core.metadata import METADATA_FILES, metadata_columns, raise_first, read_metadata, read_rows
from medart_core.prepared import SIMPLE_CAPTIONS

TABLES = (*METADATA_FILES, SIMPLE_CAPTIONS, "samples.csv")  # the last is sample.py's; the first that is there counts


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order, decoded when they are asked for; every one was decoded once by `read`.

    `digests` are sha256 of the decoded pixels, `sizes` (height, width). With `size` set, images come in that size,
    resized and cropped in the middle as training images are.
    """

    source: Path
    names: tuple[str, ...]
    openers: tuple[Callable[[], Image.Image], ...]
    digests: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    labels: tuple[str, ...] | None = None
    texts: tuple[str, ...] | None = None
    size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def image(self, row: int) -> Image.Image:
        """One image, in `size` if that is set."""
        image = self.openers[row]()
        if self.size is None or self.size == (image.height, image.width):
            return image
        pixels = ImageTransform(self.size, center_crop=True)(image).add(1).mul(127.5).round().byte()
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())

    def batch(self, rows: Sequence[int]) -> Tensor:
        """uint8 (B, 3, H, W) of the images in these rows."""
        return torch.from_numpy(np.stack([np.asarray(self.image(row)) for row in rows])).permute(0, 3, 1, 2)

    def batches(self, size: int = 32) -> Iterator[Tensor]:
        """All images in their order, uint8 (size or fewer, 3, H, W) at a time."""
        for start in range(0, len(self), size):
            yield self.batch(range(start, min(start + size, len(self))))

    @property
    def sha256(self) -> str:
        """Of all pixels, in order, and of the size that they are brought to."""
        return hashlib.sha256(" ".join((*self.digests, str(self.size))).encode()).hexdigest()

    @property
    def classes(self) -> list[str]:
        """The labels that occur, sorted."""
        return sorted(set(self.labels or ()))

    def rows_of(self, label: str) -> np.ndarray:
        """Rows of the images of one class."""
        return np.flatnonzero(np.array(self.labels or ()) == label)

    def take(self, rows: Sequence[int]) -> "ImageSet":
        """The images of these rows only."""
        per_image = {name: getattr(self, name) for name in ("names", "openers", "digests", "sizes", "labels", "texts")}
        kept = {name: tuple(values[row] for row in rows) if values else values for name, values in per_image.items()}
        return replace(self, **kept)

    def labelled_by_texts(self, classes: Sequence[str]) -> "ImageSet":
        """With the class that each image's text names, the longest of several; unchanged if a text names none."""
        named = [[name for name in classes if name.lower() in text.lower()] for text in self.texts or ()]
        if self.labels or not named or not all(named):
            return self
        return replace(self, labels=tuple(max(names, key=len) for names in named))


def read(source: Path, *, show_progress: bool = True) -> ImageSet:
    """Find the images of a folder, .zip or .npz and decode each once; classes from a table or from class folders.

    Of a folder with metadata.csv, metadata.jsonl, raw.csv or samples.csv the images named there are taken, with the
    columns `label` and `text` where there are such; else a table of the same name beside it is used, SET.csv.

    Raises:
        UserError: naming the first image that cannot be decoded, or what is wrong with the table.
    """
    if source.suffix == ".npz":
        array = npz.images(source)
        names, labels, texts = [f"{row:06d}" for row in range(len(array))], None, None
        openers = [partial(_row_of, array, row) for row in range(len(array))]
    else:
        names, labels, texts = _names(source)
        found = images_of(files_of(source))
        if missing := [name for name in names if PurePosixPath(name) not in found]:
            raise UserError(f"{source / missing[0]} is no image; correct the table beside it")
        if not names:
            names = [str(name) for name in found]
            labels = [PurePosixPath(name).parts[0] for name in names] if all("/" in name for name in names) else None
        openers = [partial(_decode, found[PurePosixPath(name)], str(source / name)) for name in names]
    if not labels and not texts:
        labels, texts = _table_beside(source, names)
    if not names:
        raise UserError(f"{source} holds no images; give a folder of them, or a .npz")
    with ThreadPoolExecutor() as pool:
        checks = pool.map(_check, openers)
        seen = list(tqdm(checks, f"checking {source.name}", len(names), disable=not show_progress, mininterval=1))
    raise_first([problem for problem, _, _ in seen if problem])
    return ImageSet(
        source,
        tuple(names),
        tuple(openers),
        tuple(digest for _, digest, _ in seen),
        tuple(size for _, _, size in seen),
        tuple(labels) if labels else None,
        tuple(texts) if texts else None,
    )


def _names(folder: Path) -> tuple[list[str], list[str] | None, list[str] | None]:
    """File names, labels and texts of the table in a folder; no names if there is no table."""
    columns = metadata_columns(folder, TABLES)
    tables = {name: read_metadata(folder, name, name, TABLES) for name in ("label", "text") if name in columns}
    if columns and not tables:
        tables["file_name"] = read_metadata(folder, "file_name", "file_name", TABLES)
    names = [name for name, _ in next(iter(tables.values()), ())]
    labels, texts = ([value for _, value in tables[name]] if name in tables else None for name in ("label", "text"))
    return names, labels, texts


def _table_beside(source: Path, names: Sequence[str]) -> tuple[list[str] | None, list[str] | None]:
    """Labels and texts of the table that sample_ddp.py leaves beside its folder and .npz, if it names these images."""
    file = source.parent / f"{source.name.removesuffix('.npz')}.csv"
    columns, rows = read_rows(file) if file.is_file() else ([], [])
    stems = [PurePosixPath(str(row.get("file_name"))).stem for _, row in rows]
    if stems != [PurePosixPath(name).stem for name in names]:
        return None, None
    values = {name: [row[name] for _, row in rows] for name in columns}
    label = values.get("name", values.get("label"))  # DiT's labels are numbers, with names beside them
    return label if label and all(label) else None, values.get("text")


def _row_of(array: np.ndarray, row: int) -> Image.Image:
    return Image.fromarray(np.array(array[row]))


def _decode(read_bytes: Callable[[], bytes], name: str) -> Image.Image:
    return open_image(io.BytesIO(read_bytes()), name)


def _check(opener: Callable[[], Image.Image]) -> tuple[str | None, str, tuple[int, int]]:
    """What is wrong with an image, its digest and its (height, width)."""
    try:
        image = opener()
    except UserError as error:
        return str(error), "", (0, 0)
    digest = hashlib.sha256(f"{image.height} x {image.width} ".encode() + image.tobytes())
    return None, digest.hexdigest(), (image.height, image.width)


# --- What two sets must not have in common, and must have ---


def one_size(images: ImageSet) -> tuple[int, int]:
    """The (height, width) of all images. Raises UserError naming two that differ."""
    for name, size in zip(images.names, images.sizes, strict=True):
        if size != images.sizes[0]:
            (h, w), (other_h, other_w) = images.sizes[0], size
            raise UserError(
                f"{images.source}: {images.names[0]} has {w} x {h} pixels and {name} {other_w} x {other_h}; "
                "generate or resize them to one size"
            )
    return images.sizes[0]


def first(images: ImageSet, count: int | None) -> ImageSet:
    """`count` images, spread evenly over the set so that all classes stay in; all by default.

    Raises:
        UserError: if there are fewer.
    """
    if count is None or count == len(images):
        return images
    if not 0 < count <= len(images):
        raise UserError(f"{images.source} holds {len(images)} images, not the {count} asked for; generate the others")
    return images.take(np.linspace(0, len(images) - 1, count).round().astype(int).tolist())


def refuse_overlap(images: ImageSet, other: ImageSet, remedy: str) -> None:
    """Raise UserError if an image, to the pixel, is in both sets."""
    name_of = dict(zip(other.digests, other.names, strict=True))
    shared = [(name, name_of[digest]) for name, digest in zip(images.names, images.digests, strict=True)
              if digest in name_of]  # fmt: skip
    if shared:
        (name, twin), more = shared[0], f" (and {len(shared) - 1} more)" if len(shared) > 1 else ""
        raise UserError(f"{images.source / name} and {other.source / twin} are the same image{more}; {remedy}")


def refuse_unknown_classes(images: ImageSet, real: ImageSet) -> None:
    """Raise UserError if images are labelled with a class that no real image has."""
    if images.labels and real.labels and (unknown := sorted(set(images.classes) - set(real.classes))):
        raise UserError(
            f"{images.source} has the class {unknown[0]!r}, {real.source} only {', '.join(map(repr, real.classes))}; "
            "name the classes alike"
        )
