"""Fine-tune the bundled LoRA on all chest X-rays of the train split, and evaluate it.

    python nano/train_lora.py

Every second image has its simple caption, the others VSG.py's description, so that prompts of both kinds are known.
The run is kept in results/lora-chest-xray; the adapters go, in bf16, to nano/lora-chest-xray, the evaluation to
nano/records/lora-chest-xray.json.
"""

import argparse
import csv
import json
import shutil
import sys
from pathlib import Path

import torch
from measure import DATA, IMAGES, draw, evaluate
from recipe import ROOT, describe, finetune
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(ROOT))
from medart_core import training_data
from medart_core.errors import exit_codes

TARGET, RECORD = ROOT / "nano" / "lora-chest-xray", ROOT / "nano" / "records" / "lora-chest-xray.json"
CHANGES = {  # of the demo's recipe, beside its number of steps
    "caption_column": "text",
    "rank": 14,  # the largest that leaves room in 1.5 MB
    "snr_gamma": 5.0,
    "proportion_empty_prompts": 0.1,  # or guidance would lead away from photographs, to ever harder contrasts
    "N_steps": 25,
    "color_loss": "unbiased",  # the published one makes all images equally bright
    "hldf_guidance_scale": 3.0,
    "checkpointing_steps": 250,
    "validation_steps": 500,
}
CARD = """# LoRA of nano/pixart for chest X-rays

{steps} steps of `medart.py` with HLDF, recipe `nano/train_lora.py`, seed 0. The images are
the train split of `python prepare.py chest-xray` (CC0 1.0, Guangzhou Women and Children's Medical Center). A
demonstration of the method at 128 px: not for diagnosis.

    python sample.py --lora nano/lora-chest-xray --prompt "A chest X-ray image of normal lungs"
"""


def mix_captions(source: Path, target: Path) -> None:
    """Copies of the splits train and val in which every second image has its simple caption as `text`."""
    for split in ("train", "val"):
        (target / split).mkdir(parents=True, exist_ok=True)
        with open(source / split / "metadata.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for number, row in enumerate(rows):
            if number % 2:
                row["text"] = row["simple_text"]
            shutil.copy(source / split / row["file_name"], target / split)
        with open(target / split / "metadata.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)


def publish(run: Path, steps: int) -> float:
    """The adapters of a run in bf16, with their card; returns the megabytes."""
    for name in ("transformer_lora", "text_encoder_lora"):
        (TARGET / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(run / name / "adapter_config.json", TARGET / name)
        tensors = load_file(run / name / "adapter_model.safetensors")
        tensors = {key: value.to(torch.bfloat16) for key, value in tensors.items()}
        save_file(tensors, TARGET / name / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copy(run / "finished.json", TARGET)
    (TARGET / "README.md").write_text(CARD.format(steps=steps))
    return round(sum(file.stat().st_size for file in TARGET.rglob("*") if file.is_file()) / 1e6, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000, help="optimiser steps (default 3000)")
    options = parser.parse_args()
    run, mixed = (ROOT / "results" / name for name in ("lora-chest-xray", "lora-chest-xray-captions"))
    training_data.locate(None)  # prepares the set, where it is not there
    describe(DATA)
    mix_captions(DATA, mixed)
    finetune(run, options.steps, seed=0, dataset_name=str(mixed / "train"), **CHANGES)
    megabytes = publish(run, options.steps)
    page = evaluate(draw(TARGET, run / "generated", IMAGES, "simple_text"), run / "evaluation")
    shutil.copy(page.with_name("report.json"), RECORD)
    print(json.dumps({"steps": options.steps, "megabytes": megabytes, "N_steps": CHANGES["N_steps"]}))
    print(f"look at {page}")


if __name__ == "__main__":
    with exit_codes():
        main()
