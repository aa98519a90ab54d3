"""What train.py learns from: stored moments, fast-DiT's .npy files, or images that are encoded in every step.

Each source has the images' number, classes and the shape of their latents, gives raw batches, and turns what was moved
to the device into scaled latents.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from medart_core import labelled_images, latents, pretrained, stopping
from medart_core.data import ShuffledBatches
from medart_core.errors import UserError
from medart_core.feature_store import FeatureStore
from medart_core.labelled_images import ImageDataset, LabelledImages
from medart_core.seeds import SharedDraws

DIGESTED = 256
MIRROR = 4  # name of the random stream
ENCODED_AT_ONCE = 8
OLD_FEATURES = "imagenet*_features"
DEFAULT_FEATURES = Path(__file__).resolve().parents[1] / "features"
Batch = tuple[Tensor, Tensor]  # raw values and classes (B,) int64


class Source(Protocol):
    """See above; `vae` is a name that `pretrained.load_vae` takes."""

    class_names: list[str]
    num_classes: int
    image_size: int
    latent_shape: tuple[int, int, int]
    vae: str

    def __len__(self) -> int: ...

    def digest(self) -> str:
        """A sha256 that tells these data from others of the same number; see each source for what goes into it."""
        ...

    def read(self, stream: Iterable[list[tuple[int, int]]], mirrors: Iterable[Tensor]) -> Iterator[Batch]:
        """A batch for each list of (epoch, index) keys; of those images that are to be mirrored, the mirror images."""
        ...

    def latents(self, values: Tensor, noise: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) fp32, drawn with standard normal noise of that shape."""
        ...


class StoredMoments:
    """A `FeatureStore`, read one batch ahead."""

    def __init__(self, store: FeatureStore):
        self.store, self.class_names, self.num_classes = store, store.class_names, len(store.class_names)
        self.image_size, self.latent_shape, self.vae = store.image_size, store.latent_shape, store.vae

    def __len__(self) -> int:
        return len(self.store)

    def digest(self) -> str:
        return self.store.digest()

    def read(self, stream: Iterable[list[tuple[int, int]]], mirrors: Iterable[Tensor]) -> Iterator[Batch]:
        rows = ([index for _, index in keys] for keys in stream)
        return _ahead(self.store.batch(*request) for request in zip(rows, mirrors, strict=False))

    def latents(self, values: Tensor, noise: Tensor) -> Tensor:
        mean, std = values.float().unbind(dim=1)
        return torch.addcmul(mean, std, noise).mul_(self.store.scaling_factor)


class OldFeatures:
    """fast-DiT's `imagenet256_features/*.npy`, scaled latents (1, C, h, w), and `imagenet256_labels/*.npy`.

    A feature and a label belong together by their name. The latents were drawn, and mirrored or not, for good.

    Raises:
        UserError: if one of a pair is missing, or the latents are of another size.
    """

    def __init__(self, folder: Path, image_size: int | None, num_classes: int, vae: str):
        self.features, self.labels = _old_folders(folder)
        names = [
            {entry.name for entry in os.scandir(part) if entry.name.endswith(".npy")} for part in _old_folders(folder)
        ]
        alone = sorted(names[0] ^ names[1])
        if alone:
            lacking = self.labels if alone[0] in names[0] else self.features
            raise UserError(f"{lacking / alone[0]} is missing ({len(alone)} such); extract the features anew")
        if not names[0]:
            raise UserError(f"{self.features} holds no .npy files; extract the features anew")
        self.names = sorted(names[0], key=lambda name: (len(name), name))  # 2.npy before 10.npy
        shape = _old_array(self.features / self.names[0]).shape
        self.latent_shape, self.image_size, self.vae = shape[-3:], shape[-1] * 8, vae
        if image_size not in (None, self.image_size):
            raise UserError(
                f"{self.features} is of {self.image_size} px images, not of {image_size}; "
                f"give --image-size {self.image_size}, or extract the features anew"
            )
        self.class_names, self.num_classes = [], num_classes

    def __len__(self) -> int:
        return len(self.names)

    def digest(self) -> str:
        """Of all names, and of the content of up to `DIGESTED` pairs, spread evenly; all of it would take too long."""
        digest, count = hashlib.sha256("\n".join(self.names).encode()), min(len(self.names), DIGESTED)
        for place in range(count):
            name = self.names[(place + 1) * len(self.names) // count - 1]
            digest.update((self.features / name).read_bytes() + (self.labels / name).read_bytes())
        return digest.hexdigest()

    def read(self, stream: Iterable[list[tuple[int, int]]], mirrors: Iterable[Tensor]) -> Iterator[Batch]:
        return _ahead(self._batch([index for _, index in keys]) for keys in stream)

    def _batch(self, indices: Sequence[int]) -> Batch:
        names = [self.names[index] for index in indices]
        features = np.stack([_old_array(self.features / name, self.latent_shape) for name in names])
        labels = np.concatenate([_old_array(self.labels / name, (1,)) for name in names])
        if not 0 <= labels.min() <= labels.max() < self.num_classes:
            worst = labels.min() if labels.min() < 0 else labels.max()
            raise UserError(
                f"{self.labels} has class {worst}, the classes are 0 to {self.num_classes - 1}; "
                "correct --num-classes, or extract the features anew"
            )
        return torch.from_numpy(features), torch.from_numpy(labels.astype(np.int64))

    def latents(self, values: Tensor, noise: Tensor) -> Tensor:
        return values.float()


class EncodedImages:
    """Images that go through the VAE in every step."""

    def __init__(self, images: LabelledImages, vae: Any, vae_name: str, image_size: int, num_workers: int):
        self.images, self.encoder, self.vae, self.num_workers = images, vae, vae_name, num_workers
        self.class_names, self.num_classes = images.class_names, len(images.class_names)
        self.image_size, side = image_size, image_size // pretrained.vae_scale_factor(vae)
        self.latent_shape = (vae.config.latent_channels, side, side)

    def __len__(self) -> int:
        return len(self.images)

    def digest(self) -> str:
        return self.images.digest()

    def read(self, stream: Iterable[list[tuple[int, int]]], mirrors: Iterable[Tensor]) -> Iterator[Batch]:
        loader = DataLoader(
            ImageDataset(self.images, self.image_size),
            batch_sampler=stream,  # pyright: ignore[reportArgumentType]
            num_workers=self.num_workers,
            worker_init_fn=stopping.leave_process_group,
        )
        for (pixel_values, labels), mirrored in zip(loader, mirrors, strict=False):
            yield torch.where(mirrored[:, None, None, None], pixel_values.flip(-1), pixel_values), labels

    def latents(self, values: Tensor, noise: Tensor) -> Tensor:
        with torch.autocast(values.device.type, enabled=False):
            parts = [latents.encode_moments(self.encoder, part) for part in values.split(ENCODED_AT_ONCE)]
        return latents.sample_latents(self.encoder, torch.cat(parts), noise)


def _old_folders(folder: Path) -> tuple[Path, Path]:
    """Those of features and labels in `folder`, which may also be that of the features itself."""
    found = [path for path in sorted(folder.glob(OLD_FEATURES)) if path.is_dir()]
    if not found and folder.match(OLD_FEATURES):
        found = [folder]
    if not found:
        raise UserError(
            f"{folder} holds no features; make them with extract_features.py, or encode images: --data-path"
        )
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise UserError(f"{folder} holds {names}; name one of them: --features-path {found[-1]}")
    features = found[0]
    labels = features.with_name(features.name.replace("_features", "_labels"))
    if not labels.is_dir():
        raise UserError(f"{labels} is missing, which has the classes of {features}; extract the features anew")
    return features, labels


def _old_array(file: Path, shape: tuple[int, ...] | None = None) -> np.ndarray:
    try:
        array = np.load(file)
        return array if shape is None else array.reshape(shape)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file} is damaged, or of another size ({error}); extract the features anew") from error


def _ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same, each read from the disk while the GPU works on the one before; a CPU has no hands free for that."""
    if not torch.cuda.is_available():
        yield from batches
        return
    with ThreadPoolExecutor(1) as reader:
        waiting = reader.submit(next, batches, None)
        while (batch := waiting.result()) is not None:
            waiting = reader.submit(next, batches, None)
            yield batch


def open_source(
    features_path: str | None,
    data_path: str | None,
    device: torch.device,
    *,
    image_size: int | None,
    num_classes: int | None,
    vae: str | None,
    num_workers: int,
) -> Source:
    """Features of a folder, or images; what is None is as the data have it.

    Raises:
        UserError: if they are of another size, have more classes, or aren't there.
    """
    vae = vae and pretrained.vae_name(vae)
    if data_path:
        images, name = labelled_images.find(Path(data_path)), vae or "ema"
        encoder = pretrained.load_vae(name, torch.float32, device)
        source: Source = EncodedImages(images, encoder, name, image_size or 256, num_workers)
    else:
        folder = Path(features_path or DEFAULT_FEATURES)
        if not folder.is_dir():
            raise UserError(f"{folder} does not exist; make features with extract_features.py, or give --data-path")
        if not any(folder.glob("*features.json")):
            return OldFeatures(folder, image_size, num_classes or 1000, vae or "ema")
        source = StoredMoments(FeatureStore(folder))
        if image_size not in (None, source.image_size):
            raise UserError(
                f"{folder} holds features of {source.image_size} px images, not of {image_size}; "
                f"give --image-size {source.image_size}, or extract others"
            )
        if vae not in (None, source.vae):
            raise UserError(f"{folder} was made with --vae {source.vae}, not with {vae}; give that, or extract others")
    if num_classes is not None and num_classes < source.num_classes:
        raise UserError(
            f"--num-classes is {num_classes}, but the data have {source.num_classes} classes; give at least that"
        )
    if num_classes is not None:
        if source.class_names:
            further = [f"class {number}" for number in range(source.num_classes, num_classes)]
            source.class_names = [*source.class_names, *further]
        source.num_classes = num_classes
    return source


def open_held_out(val_path: str | None, data_path: str | None, device: torch.device, source: Source) -> Source | None:
    """Images or features like those of `source` to measure on: of `val_path`, else of `val/` beside the images.

    Raises:
        UserError: if those of `val_path` are of another size or of other classes.
    """
    asked = val_path is not None
    if val_path is None and data_path:
        beside = Path(data_path).resolve().parent / "val"
        val_path = str(beside) if any((beside / table).is_file() for table in labelled_images.TABLES) else None
    if val_path is None:
        return None
    where = (val_path, None) if any(Path(val_path).glob("*features.json")) else (None, val_path)
    like = {"image_size": source.image_size, "num_classes": None, "vae": source.vae}
    held_out = open_source(*where, device, **like, num_workers=0)
    # A class is its number, and that depends on which classes there are.
    if source.class_names and held_out.class_names != source.class_names[: held_out.num_classes]:
        other = f"{val_path} has other classes than the training data ({', '.join(held_out.class_names)})"
        if asked:
            raise UserError(f"{other}; give held-out images of the same classes as --val-path, or leave it out")
        print(f"no validation loss: {other}", flush=True)
        return None
    return held_out


def training_batches(
    source: Source, batch_size: int, seed: int, step: int, rank: int, num_processes: int, flip: bool
) -> Iterator[Batch]:
    """This process's rows of the global batches from `step` on, without end, half of the images mirrored if `flip`."""

    def mirrors() -> Iterator[Tensor]:
        number = step
        while True:
            draws = SharedDraws((seed, MIRROR, number), batch_size, rank, num_processes)
            yield (draws.uniform() < 0.5) & flip
            number += 1

    stream = ShuffledBatches(len(source), batch_size, seed, step, rank, num_processes)
    return source.read(stream, mirrors())
