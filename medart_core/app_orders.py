"""What a person may ask the web demo for: bounded, checked, and repeatable by a command."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medart_core.errors import UserError

MOST_CHARACTERS = 2000
MOST_MODELS = 4  # side by side
MOST_IMAGES = 4  # of a class
SEEDS = (0, 2**31 - 1)
STEPS, DIT_STEPS = (2, 50), (2, 250)
GUIDANCE, STRENGTH = (1.0, 15.0), (0.0, 2.0)


def within(what: str, value: Any, bounds: tuple[float, float]) -> float:
    """`value` as a number within the bounds. Raises UserError if it is none."""
    low, high = bounds
    right = isinstance(value, int | float) and math.isfinite(value) and low <= value <= high
    if not right or (isinstance(low, int) and value != int(value)):
        allowed = (
            f"whole number from {low} to {high:,}" if isinstance(low, int) else f"number from {low:g} to {high:g}"
        )
        raise UserError(f"{what} is {'empty' if value is None else value}; give a {allowed}")
    return int(value) if isinstance(low, int) else float(value)


def text_within(what: str, value: Any) -> str:
    """A text of bounded length on one line. Raises UserError if it is longer."""
    text = " ".join(str(value or "").split())
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"{what} has {len(text):,} characters; give {MOST_CHARACTERS:,} at most")
    return text


@dataclass(frozen=True)
class PixArtOrder:
    """One picture of a prompt; the same noise whatever the model."""

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    cfg: float
    size: int
    strength: float

    @classmethod
    def checked(cls, prompt, negative_prompt, seed, steps, cfg, size, strength, *, sizes: range) -> "PixArtOrder":
        """An order from what stands in the fields. Raises UserError for what cannot be."""
        text = text_within("the prompt", prompt)
        if not text:
            raise UserError("the prompt is empty; write one, or take an example")
        side = int(within("the image size", size, (sizes[0], sizes[-1])))
        if side not in sizes:
            raise UserError(f"the image size is {side}; give a multiple of {sizes.step}")
        return cls(
            text,
            text_within("the negative prompt", negative_prompt),
            int(within("the seed", seed, SEEDS)),
            int(within("the number of steps", steps, STEPS)),
            within("the guidance", cfg, GUIDANCE),
            side,
            within("the LoRA's strength", strength, STRENGTH),
        )

    def command(self, model: str, lora: str | None) -> str:
        """The call of sample.py that draws the same picture."""
        source = {"--lora": lora, "--lora-scale": self.strength} if lora else {"--model": model}
        return _command({
            **source, "--prompt": self.prompt, "--negative-prompt": self.negative_prompt or None, "--seed": self.seed,
            "--num-images": 1, "--batch-size": 1, "--num-inference-steps": self.steps, "--cfg-scale": self.cfg,
            "--image-size": self.size,
        })  # fmt: skip


@dataclass(frozen=True)
class DiTOrder:
    """Some pictures of a class."""

    label: str
    seed: int
    steps: int
    cfg: float
    images: int
    guided_channels: int

    @classmethod
    def checked(cls, label, seed, steps, cfg, images, guided_channels, *, labels: Sequence[str]) -> "DiTOrder":
        """An order from what stands in the fields. Raises UserError for what cannot be."""
        if label not in labels:
            raise UserError(f"there is no class {label!r}; choose one of {', '.join(labels[:10])}")
        return cls(
            label,
            int(within("the seed", seed, SEEDS)),
            int(within("the number of steps", steps, DIT_STEPS)),
            within("the guidance", cfg, GUIDANCE),
            int(within("the number of images", images, (1, MOST_IMAGES))),
            int(within("the number of guided channels", guided_channels, (3, 4))),
        )

    def command(self, ckpt: str) -> str:
        """The call of sample.py that draws the same pictures."""
        return _command({
            "--ckpt": ckpt, "--class-labels": self.label, "--num-images": self.images, "--batch-size": 1,
            "--seed": self.seed, "--sampler": "dpm++", "--num-sampling-steps": self.steps, "--cfg-scale": self.cfg,
            "--guided-channels": self.guided_channels,
        })  # fmt: skip


def _command(flags: Mapping[str, Any]) -> str:
    words = [word for flag, value in flags.items() if value is not None for word in (flag, f"{value}")]
    return shlex.join(["python", "sample.py", *words])
