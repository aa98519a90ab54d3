"""Fine-tune the bundled LoRA: the demo's recipe for longer, on all chest X-rays of the train split.

    python nano/train_lora.py

The run is kept in results/lora-chest-xray; the adapters go, in bf16, to nano/lora-chest-xray.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from recipe import OPTIONS, ROOT, finetune
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(ROOT))
from medart_core.errors import exit_codes

TARGET = ROOT / "nano" / "lora-chest-xray"
CARD = """# LoRA of nano/pixart for chest X-rays

{steps} steps of `medart.py` with HLDF, recipe `nano/recipe.py`, seed 0. The images are
the train split of `python prepare.py chest-xray` (CC0 1.0, Guangzhou Women and Children's Medical Center). A
demonstration of the method at 128 px: not for diagnosis.

    python sample.py --lora nano/lora-chest-xray --prompt "A chest X-ray image of normal lungs"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200, help="optimiser steps (default 1200)")
    options = parser.parse_args()
    run: Path = ROOT / "results" / "lora-chest-xray"
    finetune(run, options.steps, seed=0)
    for name in ("transformer_lora", "text_encoder_lora"):
        (TARGET / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(run / name / "adapter_config.json", TARGET / name)
        tensors = load_file(run / name / "adapter_model.safetensors")
        tensors = {key: value.to(torch.bfloat16) for key, value in tensors.items()}
        save_file(tensors, TARGET / name / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copy(run / "finished.json", TARGET)
    (TARGET / "README.md").write_text(CARD.format(steps=options.steps))
    size = sum(file.stat().st_size for file in TARGET.rglob("*") if file.is_file()) / 1e6
    print(json.dumps({"steps": options.steps, "megabytes": round(size, 2), "N_steps": OPTIONS["N_steps"]}))


if __name__ == "__main__":
    with exit_codes():
        main()
