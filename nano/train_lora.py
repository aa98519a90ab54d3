"""Fine-tune and evaluate the bundled LoRAs, with and without HLDF: the demo's recipe for longer, on the train split.

    python nano/train_lora.py                   both
    python nano/train_lora.py --only without-hldf

The runs are kept in results/lora-chest-xray*; the adapters go, in bf16, to nano/lora-chest-xray and
nano/lora-chest-xray-without-hldf, and the figures of 200 images at the usual and at the recommended guidance to
nano/records/, as JSON of that name.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from assessment import IMAGES, draw, evaluate
from recipe import finetune
from safetensors.torch import load_file, save_file
from scripts import ROOT

sys.path.insert(0, str(ROOT))
from medart_core.checkpoint import FINISHED
from medart_core.errors import exit_codes
from medart_core.options import Parser

KINDS = {"with-hldf": "lora-chest-xray", "without-hldf": "lora-chest-xray-without-hldf"}
RECORDS = ROOT / "nano" / "records"
SCALES = (4.5, 2.0)  # of guidance: the scripts' default, and what is better here
CARD = """# LoRA of nano/pixart for chest X-rays

{steps} steps of `medart.py` {kind}, recipe `nano/recipe.py`, seed 0. The images are
the train split of `python prepare.py chest-xray` (CC0 1.0, Guangzhou Women and Children's Medical Center). A
demonstration of the method at 128 px: not for diagnosis.

    python sample.py --lora nano/{name} --cfg-scale 2 --prompt "A chest X-ray image of normal lungs"

What it reaches and what not: `nano/README.md`.
"""


def figures_of(report: Path) -> dict[str, dict[str, float | None]]:
    """The measured figures of a report.json: value, interval and what real images reach."""
    content = json.loads(report.read_text())
    found = {name: figure for name, figure in content.items() if figure.get("value") is not None}
    return {name: {key: figure[key] for key in ("value", "low", "high", "floor")} for name, figure in found.items()}


def train(kind: str, steps: int) -> Path:
    """Fine-tune one of the two and put its adapters into nano/; returns the run's folder."""
    name = KINDS[kind]
    run, target, no_hldf = ROOT / "results" / name, ROOT / "nano" / name, kind == "without-hldf"
    finetune(run, steps, seed=0, no_hldf=no_hldf)
    for part in ("transformer_lora", "text_encoder_lora"):
        (target / part).mkdir(parents=True, exist_ok=True)
        shutil.copy(run / part / "adapter_config.json", target / part)
        tensors = load_file(run / part / "adapter_model.safetensors")
        tensors = {key: value.to(torch.bfloat16) for key, value in tensors.items()}
        save_file(tensors, target / part / "adapter_model.safetensors", metadata={"format": "pt"})
    facts = json.loads((run / FINISHED).read_text()) | {"no_hldf": no_hldf}  # the web demo's title of it
    (target / FINISHED).write_text(json.dumps(facts, indent=2) + "\n")
    words = {"steps": steps, "name": name, "kind": "with HLDF" if not no_hldf else "without HLDF"}
    (target / "README.md").write_text(CARD.format(**words))
    return run


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1200, help="optimiser steps (default 1200)")
    parser.add_argument("--only", choices=KINDS, help="one of the two (default: both)")
    options = parser.parse_args()
    for kind in [options.only] if options.only else KINDS:
        run = train(kind, options.steps)
        target, record = ROOT / "nano" / run.name, {}
        for scale in SCALES:
            generated = draw(target, run / f"cfg-{scale}", IMAGES, "simple_text", "--cfg-scale", scale)
            page = evaluate(generated, run / f"evaluation-cfg-{scale}")
            record[f"guidance {scale}"] = figures_of(page.with_name("report.json"))
        (RECORDS / f"{run.name}.json").write_text(json.dumps(record, indent=2) + "\n")
        size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) / 1e6
        print(json.dumps({"lora": run.name, "steps": options.steps, "megabytes": round(size, 2)}))


if __name__ == "__main__":
    with exit_codes():
        main()
