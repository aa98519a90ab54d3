"""The whole method in minutes: chest X-rays, two fine-tunings that differ in HLDF only, one picture, measured colours.

    python nano/demo.py                                 medart/ holds the run with HLDF, and demo.png
    python nano/demo.py --seed 1 --out results/color/seed-1
    python nano/demo.py --summary results/color         the table of several seeds

Rows of the picture: real images of the test split, the base model, tuned without HLDF, tuned with HLDF for as many
steps; the same prompts and noise in all of them. Run it again after an interruption: it goes on.
"""

import argparse
import csv
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from recipe import OPTIONS, ROOT, finetune

sys.path.insert(0, str(ROOT))
from medart_core import lora_file, pretrained
from medart_core.data import ImageTransform, open_image
from medart_core.errors import UserError, exit_codes
from medart_core.objectives import chroma, color_statistics
from medart_core.pictures import image_grid
from medart_core.sampling import sample_images

DATA = ROOT / "dataset" / "chest-xray"
STEPS = 480
ROWS = ("real", "base", "tuned without HLDF", "tuned with HLDF")


def real_images(per_class: int) -> tuple[list[str], torch.Tensor]:
    """Captions (one per class) and pixels (classes, per_class, 3, 128, 128) in [-1, 1] of the test split."""
    with open(DATA / "test" / "raw.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    captions = sorted({row["text"] for row in rows})
    transform = ImageTransform(pretrained.NANO_SIZE, center_crop=True)
    chosen = []
    for caption in captions:
        names = [row["file_name"] for row in rows if row["text"] == caption]
        names = [names[i] for i in np.linspace(0, len(names) - 1, per_class).astype(int)]
        chosen.append(torch.stack([transform(open_image(DATA / "test" / name)) for name in names]))
    return captions, torch.stack(chosen)


def sampled_images(captions: list[str], per_class: int, run: Path | None) -> torch.Tensor:
    """Pixels (classes, per_class, 3, 128, 128) of the base model, or of it with the LoRA of `run`."""
    device = pretrained.pick_device()
    model = pretrained.load(None, torch.float32, device)
    if run:
        lora_file.load(model, run)
    prompts = [caption for caption in captions for _ in range(per_class)]
    seeds = list(range(per_class)) * len(captions)  # the same noise for every class and row
    dtype, _ = pretrained.pick_dtype("bf16", device)
    with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
        images = torch.stack(list(sample_images(model, prompts, seeds, batch_size=per_class)))
    return (images.permute(0, 3, 1, 2) / 127.5 - 1).unflatten(0, (len(captions), per_class))


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimiser steps of each run (default {STEPS})")
    parser.add_argument("--seed", type=int, default=0, help="of both runs (default 0)")
    parser.add_argument("--images", type=int, default=12, help="measured images per class and row (default 12)")
    parser.add_argument("--out", type=Path, default=ROOT / "medart", help="folder of the runs (default medart)")
    parser.add_argument("--summary", type=Path, metavar="DIR", help="only sum up the seeds below DIR")
    options = parser.parse_args()
    if options.summary:
        return summary(options.summary)

    start = time.perf_counter()
    updates = len(range(0, options.steps, OPTIONS["N_steps"]))
    print(
        f"plan: {options.steps} steps with HLDF ({updates} HLDF updates), {options.steps} steps without, one picture",
        flush=True,
    )
    with_hldf, without_hldf = options.out, options.out / "without_hldf"
    finetune(with_hldf, options.steps, options.seed)
    finetune(without_hldf, options.steps, options.seed, no_hldf=True)

    captions, real = real_images(options.images)
    rows = {"real": real}
    for name, run in zip(ROWS[1:], (None, without_hldf, with_hldf), strict=True):
        print(f"sampling: {name}", flush=True)
        rows[name] = sampled_images(captions, options.images, run)
    picture(captions, rows, 2).save(options.out / "demo.png")
    record = {
        "errors": {name: color_errors(rows[name], real) for name in ROWS[1:]},
        "seed": options.seed,
        "steps": options.steps,
        "hldf_updates": updates,
        "images_per_class": options.images,
        "minutes": round((time.perf_counter() - start) / 60, 1),
    }
    (options.out / "demo.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    print(f"picture: {options.out / 'demo.png'}; runs, logs and samples: {with_hldf} and {without_hldf}")


if __name__ == "__main__":
    with exit_codes():
        main()
