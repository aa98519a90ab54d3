"""Whether a generated chest X-ray shows a patient of the training set: a network that tells patients apart.

It is trained on the patients that have several images. What it can do is stated on patients it has never seen, for
"no match" means little from a network that recognises nobody.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import ResNetForImageClassification

from medart_core.errors import UserError
from medart_core.evaluation import small_resnet
from medart_core.evaluation.distances import nearest
from medart_core.evaluation.measured import Measured
from medart_core.evaluation.privacy import Pair
from medart_core.evaluation.shares import share
from medart_core.evaluation.small_resnet import BATCH
from medart_core.evaluation.utility import INTERVAL, RESAMPLES, Examples, area_under_curve
from medart_core.packaged_sets import XRAY_NAME
from medart_core.seeds import generator

AUGMENTATION, PATIENTS = 2, 3  # names of the random streams
DIMENSIONS, TEMPERATURE = 64, 0.1
STEPS, LEARNING_RATE, WEIGHT_DECAY = 400, 2e-3, 0.05
CHANCE_MATCHES = 0.05  # share of unknown patients' images that the threshold takes for a training patient's
MIN_PATIENTS = 20  # with several images each
FIGURES = ("reid_accuracy", "reid_auroc", "reid_sensitivity", "reid_copy_sensitivity", "reid_matches")


def patients_of(names: Sequence[str]) -> list[str] | None:
    """The patient of each image by its file name; None if the names are not those of the chest X-ray set.

    Stricter than `packaged_sets.xray_patient`: where both series of normal images have a number, it takes them for two
    patients. A split must not trust that they are, a network must not learn that they are not: on held-out ones that
    it was told are the same it did hardly better than chance.
    """
    found = [(name, XRAY_NAME.match(name)) for name in (PurePosixPath(path).name for path in names)]
    if not all(match for _, match in found):
        return None
    return [
        f"person{match['person']}" if match and match["person"] else name.rpartition("-")[0] for name, match in found
    ]


@dataclass
class PatientEmbedding:
    """A network whose outputs have a high cosine similarity for images of one patient."""

    network: ResNetForImageClassification
    facts: dict[str, Any]  # side, seed, steps, patients (with several images), data_sha256

    def __post_init__(self) -> None:
        self.network.eval()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> np.ndarray:
        """Unit vectors of uint8 (N, 3, H, W) images of any size: (N, DIMENSIONS) float32."""
        chunks = [small_resnet.shrink(chunk, self.facts["side"]) for chunk in images.split(BATCH)]
        inputs = [small_resnet.network_input(chunk, self.network.device) for chunk in chunks]
        return torch.cat([F.normalize(self.network(pixels).logits) for pixels in inputs]).cpu().numpy()

    def save(self, path: Path) -> None:
        """Write `path` (.safetensors) and the JSON file beside it."""
        small_resnet.save_network(path, self.network, self.facts)

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> "PatientEmbedding":
        """Raises UserError if the files are missing, damaged or of different fits."""
        network, facts = small_resnet.load_network(path)
        return cls(network.to(device), facts)  # pyright: ignore[reportArgumentType]


# --- Training ---


def fit(
    train: Examples, *, seed: int, steps: int = STEPS, device: torch.device | str = "cpu", show_progress: bool = False
) -> PatientEmbedding:
    """Train on two images of one patient against those of other patients (InfoNCE, arXiv:1807.03748).

    Half of each batch are patients with several images. The others have one, which stands for both with different
    augmentation: without them the network never sees most of the images, and tells none of those apart.

    Args:
        train: images, (N, 3, side, side), with the patients as groups.

    Raises:
        UserError: if fewer than MIN_PATIENTS patients have several images.
    """
    members = _members(train)
    several = sum(len(rows) > 1 for rows in members)
    if several < MIN_PATIENTS:
        raise UserError(f"{several} patients have several images, {MIN_PATIENTS} are needed; give more of --train")
    network = small_resnet.build(DIMENSIONS, seed).to(device)  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    draws, pairs = generator(seed, AUGMENTATION), _training_pairs(members, seed)
    network.train()
    for _ in tqdm(range(steps), "patients", disable=not show_progress, mininterval=5):
        pixels = small_resnet.network_input(train.images[next(pairs)], device)
        one, other = F.normalize(network(small_resnet.augment(pixels, draws)).logits).chunk(2)
        similarity, same = one @ other.T / TEMPERATURE, torch.arange(len(one), device=one.device)
        loss = (F.cross_entropy(similarity, same) + F.cross_entropy(similarity.T, same)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    data = small_resnet.data_sha256(train.images, [str(patient) for patient in train.groups or ()])
    facts = {"side": train.images.shape[-1], "seed": seed, "steps": steps, "patients": several, "data_sha256": data}
    return PatientEmbedding(network, facts)


def _members(examples: Examples) -> list[list[int]]:
    """The rows of each patient."""
    members: dict[Hashable, list[int]] = {}
    for row, patient in enumerate(examples.groups or ()):
        members.setdefault(patient, []).append(row)
    return list(members.values())


def _training_pairs(members: Sequence[list[int]], seed: int) -> Iterator[list[int]]:
    """Rows of two images of each of BATCH patients, or of fewer where there are not so many: all first ones, then all
    second ones."""
    random = np.random.default_rng([seed, PATIENTS])
    several, single = ([rows for rows in members if (len(rows) > 1) == wanted] for wanted in (True, False))

    def some(patients: list[list[int]]) -> list[list[int]]:
        picked = random.choice(len(patients), min(BATCH // 2, len(patients)), replace=False) if patients else ()
        return [patients[index] for index in picked]

    while True:
        pairs = [random.choice(rows, 2, replace=False).tolist() for rows in some(several)]
        pairs += [rows * 2 for rows in some(single)]
        yield [row for side in zip(*pairs, strict=True) for row in side]


# --- What it says ---


def reidentify(
    embedding: PatientEmbedding, generated: Tensor, train: Examples, held_out: Examples
) -> tuple[dict[str, Measured], list[Pair]]:
    """How well the network tells patients apart, and which training patients it sees in generated images.

    Where held-out images are judged by a threshold, it was chosen on the other half of the held-out patients.

    Args:
        generated: uint8 (N, 3, H, W).
        train, held_out: with patients as groups, none of them in both.

    Returns:
        `reid_accuracy` and `reid_auroc`: on pairs of images, one of the same and one of another patient with the same
            label for each held-out patient with several images; chance is 0.5.
        `reid_matches`: share of generated images that are more similar to a training image than 95 % of the held-out
            images are; the floor is that share of held-out images, with the threshold from other patients.
        `reid_sensitivity`: share of the held-out patients with several images whom this threshold would recognise.
        `reid_copy_sensitivity`: share of held-out images that it would recognise when they are turned, moved and
            brightened a little.
        The matches, most similar first; `distance` is 1 minus the cosine similarity.
    """
    members, vectors, known = _members(held_out), embedding(held_out.images), embedding(train.images)
    same, other = _verification_scores(vectors, held_out.labels, members)
    count, n = len(same), len(generated)
    if count < MIN_PATIENTS:
        why = f"{count} held-out patients have several images; to know what the network can do takes {MIN_PATIENTS}"
        return dict.fromkeys(FIGURES, Measured(None, n_generated=n, n_real=len(known), note=why)), []
    limits = _from_other_half(np.stack([same, other], axis=1), np.arange(count) % 2, _best_threshold)
    right = int((same >= limits).sum() + (other < limits).sum())
    note = f"{embedding.facts['patients']} patients with several images to learn from, {count} unseen ones to test on"

    own, _ = _most_similar(vectors, known)
    limit = _match_threshold(own)
    half_of_row = np.zeros(len(own), dtype=int)
    half_of_row[[row for rows in members[1::2] for row in rows]] = 1
    by_chance = float((own > _from_other_half(own, half_of_row, _match_threshold)).mean())
    found, index = _most_similar(embedding(generated), known)
    order = [row for row in np.argsort(-found, kind="stable").tolist() if found[row] > limit]
    matches = [Pair(row, int(index[row]), float(1 - found[row])) for row in order]

    recognised = share(int((same > limit).sum()), count)
    copies = share(int(((vectors * embedding(_altered(held_out.images))).sum(axis=1) > limit).sum()), len(own))
    told = f"similarity above {limit:.3f}"
    both = f"{told}, which recognises {recognised[0]:.0%} of unseen patients and {copies[0]:.0%} of altered copies"
    return {
        "reid_accuracy": Measured(*share(right, 2 * count), 0, 2 * count, 0.5, note=note),
        "reid_auroc": Measured(*_area_with_interval(same, other), 0, 2 * count, 0.5, note=note),
        "reid_sensitivity": Measured(*recognised, 0, count, note=told),
        "reid_copy_sensitivity": Measured(*copies, 0, len(own), note=told),
        "reid_matches": Measured(*share(len(matches), n), n, len(known), by_chance, note=both),
    }, matches


def _altered(images: Tensor) -> Tensor:
    """(N, 3, H, W) uint8, each turned, moved and brightened a little."""
    pixels = small_resnet.augment(small_resnet.network_input(images), generator(0, AUGMENTATION))
    return ((pixels + 1) * 127.5).round().clamp(0, 255).byte()


def _verification_scores(
    vectors: np.ndarray, labels: Sequence[str], members: Sequence[list[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Of each patient with several images, the similarity of two of them, and of one to another patient's with the
    same label: (P,) each."""
    random = np.random.default_rng(0)
    patient = {row: number for number, rows in enumerate(members) for row in rows}
    same, other = [], []
    for number, rows in enumerate(members):
        if len(rows) > 1:
            first, second = random.choice(rows, 2, replace=False)
            strangers = [row for row in patient if patient[row] != number and labels[row] == labels[first]]
            if strangers:
                same.append(vectors[first] @ vectors[second])
                other.append(vectors[first] @ vectors[random.choice(strangers)])
    return np.array(same), np.array(other)


def _most_similar(vectors: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The highest cosine similarity (N,) of unit vectors (N, D) to known ones (M, D), and of which one it is (N,)."""
    distance, index = nearest(vectors, known)
    return 1 - distance**2 / 2, index


def _match_threshold(similarity: np.ndarray) -> float:
    return float(np.quantile(similarity, 1 - CHANCE_MATCHES))


def _best_threshold(scores: np.ndarray) -> float:
    """The similarity from which on most of (P, 2) scores are right: column 0 at least that, column 1 less."""
    candidates = np.sort(scores.ravel())
    right = [(scores[:, 0] >= limit).sum() + (scores[:, 1] < limit).sum() for limit in candidates]
    return float(candidates[int(np.argmax(right))])


def _from_other_half(values: np.ndarray, half: np.ndarray, choose: Callable[[np.ndarray], float]) -> np.ndarray:
    """For each of N values the threshold that the other half's values give, (N,); `half` is 0 or 1 for each."""
    return np.where(half == 0, choose(values[half == 1]), choose(values[half == 0]))


def _area_with_interval(same: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """Area under the curve of (P,) positive and (P,) negative scores, resampled patient by patient."""
    is_same = np.arange(2 * len(same)) < len(same)
    draws = np.random.default_rng(0).integers(len(same), size=(RESAMPLES, len(same)))
    areas = [area_under_curve(np.concatenate([same[rows], other[rows]]), is_same) for rows in draws]
    low, high = np.percentile(areas, INTERVAL).tolist()
    return area_under_curve(np.concatenate([same, other]), is_same), low, high
