"""A small classifier of real images: the domain's feature extractor, and the judge of what a prompt has become."""

import copy
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import ResNetForImageClassification

from medart_core.data import ShuffledBatches
from medart_core.errors import UserError
from medart_core.evaluation import small_resnet
from medart_core.evaluation.small_resnet import BATCH, SIDE
from medart_core.prepared import split_patients
from medart_core.seeds import generator

AUGMENTATION = 1  # name of the random stream
LEARNING_RATE, WEIGHT_DECAY, LABEL_SMOOTHING = 3e-3, 0.05, 0.05
IMPATIENCE = 3  # the fit ends when this fraction (one third) of its epochs has brought nothing


@dataclass
class Classifier:
    """A fitted network, its classes in the order of its outputs, and what is known of how it came about.

    As a feature extractor it has `name`, `sha256` (of the weights) and `num_features`, and is called with images.
    """

    network: ResNetForImageClassification
    classes: tuple[str, ...]
    # side, seed, epochs, images, held_out_images, data_sha256, and held_out_accuracy on those, which the epoch was
    # chosen by: on new images it is a little lower
    facts: dict[str, Any]

    def __post_init__(self) -> None:
        self.network.eval()
        self.name = f"domain-resnet-{self.facts['side']}"
        self.sha256 = small_resnet.sha256(self.network)
        self.num_features = small_resnet.HIDDEN[-1]

    def _batches(self, images: Tensor) -> Iterator[Tensor]:
        for chunk in torch.as_tensor(images).split(BATCH):
            yield small_resnet.network_input(small_resnet.shrink(chunk, self.facts["side"]), self.network.device)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Pooled features of uint8 (N, 3, H, W) images of any size: (N, num_features) float32 on the CPU."""
        pooled = [self.network.resnet(pixels).pooler_output for pixels in self._batches(images)]
        return torch.cat(pooled).flatten(1).cpu()

    __call__ = features

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Probabilities of the classes for uint8 (N, 3, H, W) images of any size: (N, K) float32 on the CPU."""
        return torch.cat([self.network(pixels).logits.softmax(dim=1) for pixels in self._batches(images)]).cpu()

    def save(self, path: Path) -> None:
        """Write `path` (.safetensors) and the JSON file beside it."""
        small_resnet.save_network(path, self.network, self.facts | {"classes": list(self.classes)})

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> "Classifier":
        """Raises UserError if the files are missing, damaged or of different fits."""
        network, facts = small_resnet.load_network(path)
        if len(facts.get("classes", ())) != network.config.num_labels:
            raise UserError(f"{path} is no classifier; fit one with evaluate.py fit-extractor")
        return cls(network.to(device), tuple(facts.pop("classes")), facts)  # pyright: ignore[reportArgumentType]


def numbers(labels: Sequence[str], classes: Sequence[str]) -> Tensor:
    """The number of each label's class, (N,) int64.

    Raises:
        UserError: naming a label that is no class.
    """
    number = {name: place for place, name in enumerate(classes)}
    if unknown := sorted(set(labels) - set(number)):
        raise UserError(
            f"images are labelled {unknown[0]!r}, the classes are {', '.join(classes)}; rename one of them"
        )
    return torch.tensor([number[label] for label in labels])


def held_out_rows(labels: Sequence[str], groups: Sequence[Hashable] | None, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to fit on and rows, about a fifth of each class, to hold out; a group (a patient) is on one side only.

    Raises:
        UserError: naming a class that is too small to be divided.
    """
    names = [str(group) for group in groups] if groups else [f"{row:09d}" for row in range(len(labels))]
    members: dict[str, set[str]] = {}
    for name, label in zip(names, labels, strict=True):
        members.setdefault(name, set()).add(label)
    side = split_patients(members, seed)
    is_out = torch.tensor([side[name] == "test" for name in names])
    for label, count in Counter(labels).items():
        if len({bool(is_out[row]) for row, other in enumerate(labels) if other == label}) < 2:
            raise UserError(f"{label!r} has too few images ({count}) to fit on some and to test on others; give more")
    return (~is_out).nonzero().flatten(), is_out.nonzero().flatten()


def fit(
    images: Any,
    labels: Sequence[str],
    *,
    classes: Sequence[str],
    seed: int,
    epochs: int = 18,
    device: torch.device | str = "cpu",
    groups: Sequence[Hashable] | None = None,
    side: int = SIDE,
    show_progress: bool = False,
) -> Classifier:
    """Fit a classifier from random weights; the epoch with the lowest loss on a held-out fifth is kept.

    Classes count alike, however many images they have. The same arguments give the same weights on one machine with
    one number of threads.

    Args:
        images: uint8 (N, 3, H, W) in one tensor or in batches.
        epochs: passes over the images, at most; it ends sooner when the held-out loss no longer falls.
        groups: what must not be on both sides of the held-out line, such as patients; default: each image by itself.
        side: pixels to which images are resized.

    Raises:
        UserError: for a label that is no class, and for a class without images or with too few of them.
    """
    pixels, targets = small_resnet.shrink(images, side), numbers(labels, classes)
    if empty := sorted(set(classes) - set(labels)):
        raise UserError(f"no image is labelled {empty[0]!r}; give some, or leave that class out")
    rows, out = held_out_rows(labels, groups, seed)
    network = small_resnet.build(len(classes), seed).to(device)  # pyright: ignore[reportArgumentType]
    weights = (len(rows) / len(classes) / targets[rows].bincount(minlength=len(classes))).to(device)
    lowest, best, facts = float("inf"), {}, {}
    for epoch in _epochs(network, pixels[rows], targets[rows], weights, seed, epochs, show_progress):
        loss, accuracy = _held_out_figures(network, pixels[out], targets[out], weights)
        if loss < lowest:
            lowest, best = loss, copy.deepcopy(network.state_dict())
            facts = {"epochs": epoch + 1, "held_out_accuracy": accuracy}
        elif epoch + 1 - facts["epochs"] > epochs // IMPATIENCE:
            break
    network.load_state_dict(best)
    facts |= {"side": side, "seed": seed, "images": len(rows), "held_out_images": len(out)}
    return Classifier(network, tuple(classes), facts | {"data_sha256": small_resnet.data_sha256(pixels, labels)})


def _epochs(
    network: ResNetForImageClassification, pixels: Tensor, targets: Tensor, weights: Tensor, seed: int, epochs: int,
    show_progress: bool,
) -> Iterator[int]:  # fmt: skip
    """Train on (N, 3, side, side) uint8; yields the number of each epoch, counted from 0, after it."""
    batch = min(BATCH, len(pixels))
    per_epoch = len(pixels) // batch
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * per_epoch)
    stream = iter(ShuffledBatches(len(pixels), batch, seed))
    draws = generator(seed, AUGMENTATION)
    for epoch in tqdm(range(epochs), "classifier", disable=not show_progress, mininterval=5):
        network.train()
        for _ in range(per_epoch):
            rows = [row for _, row in next(stream)]
            inputs = small_resnet.augment(small_resnet.network_input(pixels[rows], network.device), draws)
            wanted = targets[rows].to(network.device)
            loss = F.cross_entropy(network(inputs).logits, wanted, weights, label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        yield epoch


@torch.no_grad()
def _held_out_figures(
    network: ResNetForImageClassification, pixels: Tensor, targets: Tensor, weights: Tensor
) -> tuple[float, float]:
    """Weighted loss, and share of images that are recognised."""
    network.eval()
    inputs = [small_resnet.network_input(chunk, network.device) for chunk in pixels.split(BATCH)]
    logits = torch.cat([network(chunk).logits for chunk in inputs])
    targets = targets.to(logits.device)
    right = (logits.argmax(dim=1) == targets).float().mean()
    return F.cross_entropy(logits, targets, weights).item(), right.item()
