"""PixArt with a saved LoRA on it, and what the run that made the LoRA says of itself."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from medart_core import full_size, lora, pretrained
from medart_core.checkpoint import FINISHED, OPTIONS
from medart_core.errors import UserError


def read_json(file: Path) -> dict:
    """The object in a small JSON file; empty when there is none."""
    try:
        content = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); remove it to sample without what it says") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not of medart.py; remove it to sample without what it says")
    return content


def run_settings(path: Path) -> dict:
    """What the run of a LoRA says of itself: its options, under what it wrote when it was finished.

    `path` is the run's folder, the file in it or a checkpoint; empty for a LoRA that lies elsewhere.
    """
    folder = (path.parent if path.is_file() else path).resolve()
    for run in (folder, folder.parent):
        if settings := read_json(run / OPTIONS) | read_json(run / FINISHED):
            return settings
    return {}


def load(
    loras: Path | Sequence[Path] | None,
    name: str | None,
    dtype: torch.dtype,
    device: torch.device,
    *,
    lora_scale: float | Sequence[float] = 1.0,
    random_weights: bool = False,
) -> pretrained.PixArt:
    """The model `name`, or the one that the LoRA was made for, or the bundled one, with one LoRA or several on it.

    Raises:
        UserError: if the LoRA was made for a folder that it only knows the last name of, as share.py leaves it.
    """
    paths = [loras] if isinstance(loras, Path) else loras
    adapters, strength = lora.read_several(paths, lora_scale) if paths else ({}, 1.0)
    made_for = lora.base_model(adapters)
    if random_weights or (name or made_for) == full_size.NAME:
        model = full_size.build_random(dtype, device)
    else:
        if not name and made_for and "/" not in made_for and not Path(pretrained.find(made_for)).is_dir():
            raise UserError(f"the LoRA was made for a folder named {made_for}, which is not here; give it as --model")
        name = name or made_for
        model = pretrained.load(name, dtype, device)
    lora.apply(model, adapters, strength)
    return model
