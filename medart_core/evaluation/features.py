"""Feature vectors of image sets: by any extractor, on any number of processes, kept on disk by content."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, distributed
from tqdm import tqdm

from medart_core.evaluation.images import ImageSet

GROUP = 32  # images that are computed together, always: on a CPU the number changes the last bits


class Extractor(Protocol):
    """What turns images into vectors; `name` says how it resizes, `sha256` is that of its weights or definition."""

    name: str
    sha256: str
    num_features: int

    def __call__(self, images: Tensor, /) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, num_features)."""
        ...


def rank_and_size() -> tuple[int, int]:
    """This process's number and the number of processes that share the work."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def extract(images: ImageSet, extractor: Extractor, cache: Path, *, group: int = GROUP) -> np.ndarray:
    """Features of a set, (N, D) float32, as a map of a file in `cache`; process 0 gets them, others (0, D).

    The set is cut by global index into groups of a fixed size (the last one is filled up), and groups are shared out,
    so the numbers do not depend on how many processes there are. Memory does not grow with N.
    """
    rank, num_processes = rank_and_size()
    key = f"{images.sha256} {extractor.name} {extractor.sha256} {group}"
    file = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    shape = (len(images), extractor.num_features)
    known = torch.tensor([rank == 0 and _is_whole(file, shape)])
    if num_processes > 1:
        distributed.broadcast(known, 0)
    if not known:
        _compute(images, extractor, file, group)
    return np.load(file, mmap_mode="r", allow_pickle=False) if rank == 0 else np.empty((0, shape[1]), np.float32)


def extract_all(sets: Mapping[str, ImageSet], extractor: Extractor | None, cache: Path) -> dict[str, np.ndarray]:
    """Features of several sets by name; none without an extractor."""
    return {name: extract(images, extractor, cache) for name, images in sets.items()} if extractor else {}


def _is_whole(file: Path, shape: tuple[int, int]) -> bool:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False).shape == shape
    except (OSError, ValueError, EOFError):
        return False


@torch.inference_mode()
def _compute(images: ImageSet, extractor: Extractor, file: Path, group: int) -> None:
    rank, num_processes = rank_and_size()
    beside, rows = file.with_name(f".{file.name}-{os.getpid()}"), None
    if rank == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        shape = (len(images), extractor.num_features)
        rows = np.lib.format.open_memmap(beside, "w+", np.float32, shape)
    title = f"{images.source.name}: {extractor.name.split()[0]}"
    progress = tqdm(desc=title, total=len(images), unit=" images", disable=rank > 0, mininterval=1)
    for start in range(0, len(images), group * num_processes):
        mine = np.arange(group) + start + rank * group
        found = extractor(images.batch(mine.clip(max=len(images) - 1).tolist())).float().cpu().contiguous()
        parts = [found]
        if num_processes > 1:
            parts = [torch.empty_like(found) for _ in range(num_processes)]
            distributed.all_gather(parts, found)
        if rows is not None:
            stop = min(start + group * num_processes, len(images))
            rows[start:stop] = torch.cat(parts)[: stop - start].numpy()
            progress.update(stop - start)
    progress.close()
    if rows is not None:
        rows.flush()
        os.replace(beside, file)
