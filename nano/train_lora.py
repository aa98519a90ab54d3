"""Fine-tune the bundled LoRA: the demo's recipe for longer, on all chest X-rays of the train split; and evaluate it.

    python nano/train_lora.py

The run is kept in results/lora-chest-xray; the adapters go, in bf16, to nano/lora-chest-xray, and the figures of 200
images at the usual and at the recommended guidance to nano/records/lora-chest-xray.json.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from assessment import IMAGES, draw, evaluate
from recipe import OPTIONS, ROOT, finetune
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(ROOT))
from medart_core.errors import exit_codes

TARGET, RECORD = ROOT / "nano" / "lora-chest-xray", ROOT / "nano" / "records" / "lora-chest-xray.json"
SCALES = (4.5, 2.0)  # of guidance: the scripts' default, and what is better here
CARD = """# LoRA of nano/pixart for chest X-rays

{steps} steps of `medart.py` with HLDF, recipe `nano/recipe.py`, seed 0. The images are
the train split of `python prepare.py chest-xray` (CC0 1.0, Guangzhou Women and Children's Medical Center). A
demonstration of the method at 128 px: not for diagnosis.

    python sample.py --lora nano/lora-chest-xray --cfg-scale 2 --prompt "A chest X-ray image of normal lungs"

What it reaches and what not: `nano/README.md`.
"""


def figures_of(report: Path) -> dict[str, dict[str, float | None]]:
    """The measured figures of a report.json: value, interval and what real images reach."""
    content = json.loads(report.read_text())
    found = {name: figure for name, figure in content.items() if figure.get("value") is not None}
    return {name: {key: figure[key] for key in ("value", "low", "high", "floor")} for name, figure in found.items()}


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
    record = {}
    for scale in SCALES:
        generated = draw(TARGET, run / f"cfg-{scale}", IMAGES, "simple_text", "--cfg-scale", scale)
        page = evaluate(generated, run / f"evaluation-cfg-{scale}")
        record[f"guidance {scale}"] = figures_of(page.with_name("report.json"))
    RECORD.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({"steps": options.steps, "megabytes": round(size, 2), "N_steps": OPTIONS["N_steps"]}))


if __name__ == "__main__":
    with exit_codes():
        main()
