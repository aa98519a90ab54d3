"""How the rows of the ablation are trained and drawn: the scripts' command lines."""

import sys
from pathlib import Path
from typing import NamedTuple

from ablation_data import balanced_numbers, labels_of
from ablation_rows import DIT, PIXELS, Row
from recipe import arguments
from scripts import ROOT

sys.path.insert(0, str(ROOT))
from medart_core.metadata import NO_CAPTIONS


class Recipe(NamedTuple):
    """How a row is trained and drawn.

    `numbers` are the drawn images that count, `labels` the classes that they were asked for, None if none was.
    """

    train: list[str]
    finished: Path
    weights: str  # a pattern
    draw: list[str]
    numbers: list[int]
    labels: list[str] | None


def lora(row: Row, run: Path, data: Path, steps: int) -> Recipe:
    """Med-Art, or what the row changes in it."""
    options = row.options | {"max_train_steps": steps, "seed": row.seed}
    options |= {"dataset_name": data / "train", "resolution": PIXELS[row.data]}
    column, labels = options["caption_column"], labels_of(data / "prompts")
    return Recipe(
        train=["medart.py", *arguments(run / "lora", options)],
        finished=run / "lora" / "finished.json",
        weights="lora/*_lora/adapter_model.safetensors",
        draw=[f"--lora={run / 'lora'}", f"--metadata={data / 'prompts'}", f"--caption-column={column}"],
        numbers=list(range(len(labels))),
        labels=None if column == NO_CAPTIONS else labels,
    )


def dit(row: Row, run: Path, data: Path, features: Path, steps: int) -> Recipe:
    """DiT from scratch; it draws the classes in turn, of which as many count as the others have."""
    result = run / f"000-{DIT['model'].replace('/', '-')}"
    labels, classes = labels_of(data / "prompts"), sorted(set(labels_of(data / "train")))
    options = row.options | {"max-steps": steps, "global-seed": row.seed}
    options |= {"results-dir": run, "features-path": features}
    checkpoint = result / "checkpoints" / f"{steps:07d}.pt"
    return Recipe(
        train=["train.py", *(f"--{name}={value}" for name, value in options.items()), "--no-flip"],
        finished=result / "finished.json",
        weights=str(checkpoint.relative_to(run)),
        draw=[f"--ckpt={checkpoint}", "--balanced", "--sampler=dpm++", "--guided-channels=4", "--cfg-scale=2"],
        numbers=balanced_numbers(labels, classes),
        labels=labels,
    )
