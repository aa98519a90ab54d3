"""The recipe of the demo, of the colour table and of the bundled LoRA: one set of options for medart.py."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = {
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


def arguments(output_dir: Path, steps: int, seed: int, **changes) -> list[str]:
    """medart.py's command line for a run by the recipe, with some options changed."""
    command = [f"--output_dir={output_dir}"]
    for name, value in {**OPTIONS, "max_train_steps": steps, "seed": seed, **changes}.items():
        command += [f"--{name}"] if value is True else [] if value is False else [f"--{name}={value}"]
    return command


def finetune(output_dir: Path, steps: int, seed: int, **changes) -> None:
    """Run medart.py in a process of its own, unless that run is finished; an interrupted one goes on.

    Raises:
        SystemExit: with medart.py's exit code, when it failed.
    """
    if (output_dir / "finished.json").exists():
        print(f"{output_dir} is finished already", flush=True)
        return
    script = [sys.executable, str(ROOT / "medart.py")]
    code = subprocess.run([*script, *arguments(output_dir, steps, seed, **changes)]).returncode
    if code:
        sys.exit(code)
