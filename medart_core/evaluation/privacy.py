"""Whether generated images repeat training images, judged by how near held-out images come to them."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from medart_core.evaluation import small_resnet
from medart_core.evaluation.distances import nearest, nearest_other
from medart_core.evaluation.measured import MARGIN, MIN_IMAGES, Measured
from medart_core.evaluation.shares import share
from medart_core.near_duplicates import BLOCK, MAX_DISTANCE, hash_distances, perceptual_hash

PIXEL_SIDE = 32
NEAR = 0.01  # share of the held-out images that lie nearer to the training images than what is called near
NUM_PAIRS = 24  # of the sheet for people to look at


class Pair(NamedTuple):
    """A generated image and its nearest training image, by their places in the two sets."""

    generated: int
    train: int
    distance: float


def pixel_vectors(images: Any) -> np.ndarray:
    """Images, shrunk, as (N, 3072) float32, so that a Euclidean distance is a root mean square of [0, 1] pixels."""
    small = small_resnet.shrink(images, PIXEL_SIDE).flatten(1).float()
    return (small / 255 / small.shape[1] ** 0.5).numpy()


def is_authentic(generated: np.ndarray, train: np.ndarray, reach: np.ndarray | None = None) -> np.ndarray:
    """For vectors (N, D): is each farther from its nearest training vector than that one's nearest other one: (N,).

    Authenticity of Alaa et al. (arXiv:2102.08921, section 4.3). For new vectors of the same distribution the answer
    is no for those that are the mutual nearest neighbours of another one: a share that hangs on the distribution, not
    on the number of vectors, so that sets of different sizes may be compared.

    `reach` is `nearest_other(train)`, where it is known.
    """
    distance, index = nearest(generated, train)
    return distance > (nearest_other(train) if reach is None else reach)[index]


def distance_figures(
    generated: np.ndarray,
    train: np.ndarray,
    held_out: np.ndarray,
    *,
    extractor: str | None = None,
    sha256: str | None = None,
) -> dict[str, Measured]:
    """How near generated vectors (N, D) come to training vectors (M, D), beside what held-out real ones (H, D) do.

    Returns:
        `authpct`: percent of authentic images; its floor is that of held-out images against the same training images.
        `authpct_gap`: `authpct` minus the percentage against the held-out images, in points. The generator's faults
            move both alike; below 0, training images are repeated. Its floor has one half of the held-out images in
            place of the generated ones and the other half in place of the held-out ones.
        `nearest_distance`: median distance to the nearest training image; its floor is that of held-out images.
        `near_share`: share of images nearer to a training image than all but 1 % of the held-out ones are.
    """
    n = len(generated)
    if min(n, len(train), len(held_out) // 2) < MIN_IMAGES:
        why = f"{n} generated, {len(train)} training and {len(held_out)} held-out images are too few"
        missing = Measured(None, None, None, n, len(train), None, extractor, sha256, why)
        return dict.fromkeys(("authpct", "authpct_gap", "nearest_distance", "near_share"), missing)
    shuffled = held_out[np.random.default_rng(0).permutation(len(held_out))]
    halves = shuffled[: len(held_out) // 2], shuffled[len(held_out) // 2 :]
    reach = nearest_other(train)
    authentic = is_authentic(generated, train, reach)
    percent, low, high = (100 * value for value in share(int(authentic.sum()), n))
    floor = 100 * float(is_authentic(held_out, train, reach).mean())
    differences = 100 * (authentic.astype(float) - is_authentic(generated, held_out))
    gap, margin = float(differences.mean()), MARGIN * float(differences.std(ddof=1)) / n**0.5
    gap_floor = 100 * float(is_authentic(halves[0], train, reach).mean() - is_authentic(*halves).mean())

    distance, own = nearest(generated, train)[0], nearest(held_out, train)[0]
    middle = np.clip(0.5 + MARGIN / 2 / n**0.5 * np.array([0, -1, 1]), 0, 1)  # order statistics around the median
    median, shortest, longest = (float(value) for value in np.quantile(distance, middle))
    limit = np.quantile(own, NEAR)
    near = int((distance < limit).sum())
    sizes = (n, len(train))
    return {
        "authpct": Measured(percent, low, high, *sizes, floor, extractor, sha256),
        "authpct_gap": Measured(gap, gap - margin, gap + margin, *sizes, gap_floor, extractor, sha256),
        "nearest_distance": Measured(median, shortest, longest, *sizes, float(np.median(own)), extractor, sha256),
        "near_share": Measured(*share(near, n), *sizes, NEAR, extractor, sha256),
    }


def closest_pairs(generated: np.ndarray, train: np.ndarray, count: int = NUM_PAIRS) -> list[Pair]:
    """The `count` generated images that are nearest to a training image, nearest first, each with that image."""
    distance, index = nearest(generated, train)
    order = np.argsort(distance, kind="stable")[:count]
    return [Pair(int(row), int(index[row]), float(distance[row])) for row in order]


# --- Perceptual hashes ---


def hashes(images: Iterable[Image.Image]) -> np.ndarray:
    """The perceptual hash of each image, (N, 4) uint64."""
    return np.array([perceptual_hash(image) for image in images], dtype=np.uint64).reshape(-1, 4)


def duplicates(generated: np.ndarray, train: np.ndarray, max_distance: int = MAX_DISTANCE) -> list[Pair]:
    """Generated images whose hash (N, 4) is close to a training image's (M, 4): closest first, in bits of 256."""
    pairs = []
    for start in range(0, len(generated), BLOCK):
        distances = hash_distances(generated[start : start + BLOCK], train)
        for row, index in enumerate(distances.argmin(axis=1).tolist()):
            if distances[row, index] <= max_distance:
                pairs.append(Pair(start + row, index, float(distances[row, index])))
    return sorted(pairs, key=lambda pair: pair.distance)


def duplicate_share(generated: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> Measured:
    """Share of generated images that are duplicates of a training image by their hashes (N, 4), (M, 4) and (H, 4)."""
    found, n = len(duplicates(generated, train)), len(generated)
    floor = len(duplicates(held_out, train)) / len(held_out)
    note = f"at most {MAX_DISTANCE} of 256 bits differ"
    return Measured(*share(found, n), n, len(train), floor, "perceptual hash", note=note)
