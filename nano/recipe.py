"""The recipe of the demo, of the colour table and of the bundled LoRA: one set of options for medart.py."""

import json
import sys
from pathlib import Path
from typing import Any

from scripts import call

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from medart_core import checkpoint
from medart_core.caption_report import TOO_MANY_FELL_BACK
from medart_core.errors import UserError

OPTIONS = {
    "caption_column": "simple_text",  # VSG.py overwrites the column `text`
    "no_hldf": False,
    "center_crop": True,
    "cache_latents": True,
    "train_batch_size": 24,
    "learning_rate": 2e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 20,
    "rank": 8,
    "M_times": 20,
    "N_steps": 10,
    "hldf_batch_size": 2,
    "max_grad_norm": 0.05,
    "mixed_precision": "bf16",
    "checkpointing_steps": 100,
    "checkpoints_total_limit": 1,
    "validation_steps": 200,
}


def arguments(output_dir: Path, options: dict[str, Any]) -> list[str]:
    """medart.py's command line for a run with these options."""
    command = [f"--output_dir={output_dir}"]
    for name, value in options.items():
        for each in value if isinstance(value, list) else [value]:
            command += [f"--{name}"] if each is True else [] if each is False else [f"--{name}={each}"]
    return command


def describe(data_dir: Path, *flags: str) -> None:
    """Run VSG.py; an interrupted run goes on, a finished one is taken. Raises SystemExit when it failed."""
    call("VSG.py", f"--data-dir={data_dir}", *flags, fine=(0, TOO_MANY_FELL_BACK))  # that is only worth a look


def finetune(output_dir: Path, steps: int, seed: int, **changes) -> None:
    """Run medart.py, unless that run is finished; an interrupted one goes on.

    Raises:
        UserError: naming the options that differ, when another run is finished there.
        SystemExit: with medart.py's exit code, when it failed.
    """
    options = OPTIONS | {"max_train_steps": steps, "seed": seed} | changes
    if (output_dir / checkpoint.FINISHED).exists():
        before = json.loads((output_dir / checkpoint.OPTIONS).read_text())
        pairs = [(name, before.get(name), value) for name, value in options.items()]
        changed = [f"{name} {old} -> {new}" for name, old, new in pairs if old != new]
        if changed:
            raise UserError(
                f"{output_dir} holds another finished run ({', '.join(changed)}); "
                "move it away, or give nano/demo.py another --out"
            )
        print(f"{output_dir} is finished already", flush=True)
        return
    call("medart.py", *arguments(output_dir, options))
