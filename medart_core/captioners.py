"""Which LLaVA-NeXT describes a set: the bundled one for what its card names, the published one for all else."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

import torch

from medart_core.errors import UserError
from medart_core.training_data import locate

NANO, FULL_SIZE = "nano/llava-next", "llava-hf/llama3-llava-next-8b-hf"
TOKENIZER = "nano/pixart"
PUBLISHED = "lmms-lab/llama3-llava-next-8b"  # the paper's name of FULL_SIZE, in files that transformers cannot read
# 8.4 billion parameters in bf16, the cache of 16 images of 0.4 GB, as much in redraws, 5 GB for the prefill; counted.
FULL_SIZE_BYTES = 36e9


def known_domains(model: str) -> list[str] | None:
    """The domains that the card of a model's folder names; None if it has no such card, and may be asked anything."""
    card = Path(locate(model)) / "card.json"
    if not card.is_file():
        return None
    try:
        return list(json.loads(card.read_text(encoding="utf-8"))["domains"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{card} has no readable list of domains; install the model again, or remove the card"
        ) from error


def choose(asked: str | None, example_of: Mapping[str | None, str], data_dir: str) -> str:
    """The model that was asked for, else the bundled one, else (on a GPU that holds it) the published one.

    `example_of` has the domains to be described, None for an unknown one, each with a simple caption.

    Raises:
        UserError: if the model's card does not name one of the domains, with the command that works.
    """
    model = FULL_SIZE if asked == PUBLISHED else asked or NANO
    known = known_domains(model)
    foreign = [domain for domain in example_of if known is not None and domain not in known]
    if not foreign:
        return model
    caption = example_of[foreign[0]]
    reason = f"{model} knows {', '.join(known or ())} only, not {foreign[0] or 'the domain'} of {caption!r}"
    if asked is None and _gpu_bytes() >= FULL_SIZE_BYTES:
        print(f"{reason}: using {FULL_SIZE}", flush=True)
        return FULL_SIZE
    raise UserError(f"{reason}; on a GPU: python VSG.py --data-dir {shlex.quote(data_dir)} --model {FULL_SIZE}")


def _gpu_bytes() -> int:
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
