"""The whole method in minutes: chest X-rays are described, and the bundled model fine-tuned with and without HLDF.

    python nano/demo.py                                 medart/ holds the run with HLDF, demo.png, evaluation/
    python nano/demo.py --quick                         the same in a third of the time, to see that all works
    python nano/demo.py --captions simple --seed 1 --no-evaluation --out results/color/seed-1
    python nano/demo.py --summary results/color         the table of several seeds

Rows of the picture: real images of the test split, the base model, tuned without HLDF, tuned with HLDF for as many
steps; the prompts are the captions of the real images, the noise is the same in all rows. At the end evaluate.py
measures images of the last model: medart/evaluation/report.html. Run it again after an interruption: it goes on.
"""

import csv
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from medart_core.errors import UserError, exit_codes  # isort: skip (first, for a Ctrl-C while the rest loads)
import numpy as np
import torch
from assessment import draw, evaluate
from PIL import Image
from recipe import OPTIONS, describe, finetune
from scripts import ROOT, named

from medart_core import devices, lora, pretrained, training_data
from medart_core.data import ImageTransform, open_image
from medart_core.objectives import chroma, color_statistics
from medart_core.options import Parser
from medart_core.pictures import image_grid
from medart_core.sampling import sample_images

DATA = ROOT / "dataset" / "chest-xray"
STEPS, QUICK_STEPS = 480, 100
IMAGES, QUICK_IMAGES = 12, 6  # measured per class and row
QUICK_DESCRIBED = 160  # of each split
DRAWN, QUICK_DRAWN = 200, 60  # for the evaluation
COLUMNS = {"vsg": "text", "simple": "simple_text"}
ROWS = ("real", "base", "tuned without HLDF", "tuned with HLDF")


class Real(NamedTuple):
    """Images of the test split by class: the simple caption of each class, a prompt per image, and the pixels."""

    classes: list[str]
    prompts: list[list[str]]
    pixels: torch.Tensor  # (classes, per class, 3, 128, 128) in [-1, 1]


def real_images(per_class: int, column: str) -> Real:
    """Images that are evenly spread over each class; with `column` "text" those that VSG.py has described."""
    with open(DATA / "test" / "metadata.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    transform = ImageTransform(pretrained.NANO_SIZE, center_crop=True)
    classes = sorted({row["simple_text"] for row in rows})
    prompts, pixels = [], []
    for simple in classes:
        of_class = [row for row in rows if row["simple_text"] == simple]
        described = [row for row in of_class if row[column] != simple]
        candidates = described if len(described) >= per_class else of_class
        chosen = [candidates[i] for i in np.linspace(0, len(candidates) - 1, per_class).astype(int)]
        prompts.append([row[column] for row in chosen])
        pixels.append(torch.stack([transform(open_image(DATA / "test" / row["file_name"])) for row in chosen]))
    return Real(classes, prompts, torch.stack(pixels))


def sampled_images(real: Real, run: Path | None) -> torch.Tensor:
    """Pixels like those of `real`, of the base model, or of it with the LoRA of `run`."""
    device = devices.pick_device()
    model = pretrained.load(None, torch.float32, device)
    if run:
        lora.load(model, run)
    per_class = len(real.prompts[0])
    prompts = [prompt for of_class in real.prompts for prompt in of_class]
    seeds = list(range(per_class)) * len(real.classes)  # the same noise for every class and row
    dtype, _ = devices.pick_dtype("bf16", device)
    with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
        images = torch.stack(list(sample_images(model, prompts, seeds, batch_size=per_class)))
    return (images.permute(0, 3, 1, 2) / 127.5 - 1).unflatten(0, (len(real.classes), per_class))


def color_errors(generated: torch.Tensor, real: torch.Tensor) -> dict[str, float]:
    """Distance of the average colour statistics, and difference of the average chroma, each averaged over classes."""
    distances, chroma_errors = [], []
    for drawn, true in zip(generated, real, strict=True):
        drawn_statistics, true_statistics = (torch.cat(color_statistics(x), dim=1).mean(0) for x in (drawn, true))
        distances.append((drawn_statistics - true_statistics).norm().item())
        chroma_errors.append((chroma(drawn).mean() - chroma(true).mean()).abs().item())
    return {"color_distance": float(np.mean(distances)), "chroma_error": float(np.mean(chroma_errors))}


def picture(captions: list[str], rows: dict[str, torch.Tensor], columns: int) -> Image.Image:
    """Rows of the first `columns` images of every class."""
    lines = []
    for pixels in rows.values():
        images = pixels[:, :columns].flatten(0, 1).clamp(-1, 1).add(1).mul(127.5).round().byte()
        lines.append([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images])
    names = [caption for caption in captions for _ in range(columns)]
    return image_grid(lines, row_names=list(rows), column_names=names)


def summary(folder: Path) -> None:
    """Print the mean and the range over the seeds of every row's colour errors, and write summary.json."""
    files = sorted(folder.glob("*/demo.json"))
    if not files:
        raise UserError(f"{folder} has no */demo.json; run python nano/demo.py --seed N --out {folder}/seed-N first")
    records = [json.loads(file.read_text()) for file in files]
    table = {}
    for row in ROWS[1:]:
        table[row] = {}
        for name in ("color_distance", "chroma_error"):
            values = [record["errors"][row][name] for record in records]
            table[row][name] = {
                "mean": round(float(np.mean(values)), 4),
                "low": round(min(values), 4),
                "high": round(max(values), 4),
            }
    result = {"seeds": [record["seed"] for record in records], "steps": records[0]["steps"], "errors": table}
    (folder / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer images and steps; goes to results/quick-demo")
    parser.add_argument("--captions", choices=COLUMNS, default="vsg", help="what to train on and to sample from")
    parser.add_argument("--steps", type=int, help=f"optimiser steps of each run (default {STEPS})")
    parser.add_argument("--seed", type=int, default=0, help="of both runs (default 0)")
    parser.add_argument("--images", type=int, help=f"measured images per class and row (default {IMAGES})")
    parser.add_argument("--no-evaluation", action="store_true", help="leave the evaluation at the end out")
    parser.add_argument("--out", type=Path, help="folder of the runs (default medart)")
    parser.add_argument("--summary", type=Path, metavar="DIR", help="only sum up the seeds below DIR")
    options = parser.parse_args()
    if options.summary:
        return summary(options.summary)
    steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
    with_hldf: Path = (options.out or ROOT / ("results/quick-demo" if options.quick else "medart")).resolve()
    without_hldf, column = with_hldf / "without_hldf", COLUMNS[options.captions]

    start = time.perf_counter()
    updates = len(range(0, steps, OPTIONS["N_steps"]))
    print(
        f"plan: {'VSG, ' if options.captions == 'vsg' else ''}{steps} steps with HLDF ({updates} HLDF updates), "
        f"{steps} steps without, one picture{'' if options.no_evaluation else ', the evaluation'}",
        flush=True,
    )
    training_data.locate(None)  # prepares the set, where it is not there
    if options.captions == "vsg":
        describe(DATA, *([f"--max-images={QUICK_DESCRIBED}"] if options.quick else []))
    real = real_images(options.images or (QUICK_IMAGES if options.quick else IMAGES), column)
    shown = [of_class[0] for of_class in real.prompts]  # in the runs' own sample grids
    for run, no_hldf in ((with_hldf, False), (without_hldf, True)):
        finetune(run, steps, options.seed, caption_column=column, validation_prompt=shown, no_hldf=no_hldf)

    rows = {"real": real.pixels}
    for name, run in zip(ROWS[1:], (None, without_hldf, with_hldf), strict=True):
        print(f"sampling: {name}", flush=True)
        rows[name] = sampled_images(real, run)
    picture(real.classes, rows, 2).save(with_hldf / "demo.png")
    record = {
        "captions": options.captions,
        "errors": {name: color_errors(rows[name], real.pixels) for name in ROWS[1:]},
        "seed": options.seed,
        "steps": steps,
        "hldf_updates": updates,
        "images_per_class": len(real.prompts[0]),
        "minutes": round((time.perf_counter() - start) / 60, 1),
    }
    (with_hldf / "demo.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    drawn = named(with_hldf / "demo.png")
    print(f"runs, logs and samples: {named(with_hldf)} and {named(without_hldf)}; picture: {drawn}")

    if not options.no_evaluation:
        count = QUICK_DRAWN if options.quick else DRAWN
        print(f"evaluation: {count} images of the run with HLDF", flush=True)
        generated = draw(with_hldf, with_hldf / "generated", count, column)
        quick = ["--no-patients", "--resamples", 20] if options.quick else []
        page = evaluate(generated, with_hldf / "evaluation", "--utility-seeds", 1, *quick)
        print(f"open {named(page)} in a browser; picture: {drawn}")


if __name__ == "__main__":
    with exit_codes():
        main()
