"""Pictures that are nearly the same: a perceptual hash, and the groups that close hashes form.

The usual library for such hashes, imagehash, brings SciPy and PyWavelets along; with NumPy and Pillow it is a page.
"""

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

import numpy as np
from PIL import Image

Member = TypeVar("Member", bound=Hashable)

SIDE, KEPT = 32, 8  # the hash sees SIDE x SIDE grey levels, of whose cosine transform it keeps KEPT x KEPT
# Rows of the type-II cosine transform; their lengths do not matter here.
COSINES = np.cos(np.pi / SIDE * np.arange(KEPT)[:, None] * (np.arange(SIDE) + 0.5))
# Of 64 bits. JPEG, half the size, noise or brightness flip up to 4, cutting 2 % off each side flips 4 (up to 10). Of
# 1,200 different chest X-rays, far more alike than endoscopic frames, 6 chains at most 134 into a group, 8 chains 473.
MAX_DISTANCE = 6
BLOCK = 1024  # hashes that are compared with all others at a time: 64 MB for 8,000


class LinkedGroups(Generic[Member]):
    """Groups that grow together as their members are linked (union-find)."""

    def __init__(self) -> None:
        self._leader: dict[Member, Member] = {}

    def leader(self, member: Member) -> Member:
        """The member that stands for the group; one that was never linked stands for itself."""
        while (above := self._leader.setdefault(member, member)) != member:
            self._leader[member] = self._leader[above]  # shortens the way of the next call
            member = above
        return member

    def link(self, member: Member, other: Member) -> None:
        """Make one group of the groups of both; that of `other` keeps its leader."""
        self._leader[self.leader(member)] = self.leader(other)


def perceptual_hash(image: Image.Image) -> np.uint64:
    """64 bits of an image: which of its lowest 8 x 8 spatial frequencies lie above their median ("pHash").

    Source: C. Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010, section 3.2.1.
    """
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    frequencies = COSINES @ (grey - grey.mean()) @ COSINES.T
    bits = frequencies > np.median(frequencies)
    return np.packbits(bits).view(np.uint64)[0]


def cluster(images: Iterable[Image.Image], max_distance: int = MAX_DISTANCE) -> list[int]:
    """A group number per image, counted from 0 as groups appear; images with close hashes are in one group.

    Groups are chained (single linkage): the first and the last of a slow sequence may differ much. `images` are taken
    one by one and not kept. `max_distance` is in bits of 64.
    """
    hashes = np.array([perceptual_hash(image) for image in images], dtype=np.uint64)
    distinct, which = np.unique(hashes, return_inverse=True)
    groups = LinkedGroups[int]()
    for start in range(0, len(distinct), BLOCK):
        distances = np.bitwise_count(distinct[start : start + BLOCK, None] ^ distinct[None, start:])
        for one, other in np.argwhere(np.triu(distances <= max_distance, k=1)).tolist():
            groups.link(start + other, start + one)
    number: dict[int, int] = {}
    return [number.setdefault(groups.leader(place), len(number)) for place in which.tolist()]
