"""Class-conditional DiT in minutes: chest X-rays -> features -> DiT-S/4 -> class grid -> 200 images and their .npz.

    python nano/demo_dit.py                                   7 minutes on 2 cores
    python nano/demo_dit.py --steps 3000 --out results/dit    longer, as for the README's picture

Every stage is one of the scripts, as a user would call it. Run it again after an interruption: it goes on.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from scripts import ROOT, call, named

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from medart_core import numbered_runs
from medart_core.checkpoint import FINISHED
from medart_core.errors import exit_codes
from medart_core.labelled_images import find
from medart_core.options import Parser
from medart_core.pictures import image_grid
from medart_core.sampling import to_uint8

DATA = ROOT / "dataset" / "chest-xray"
MODEL, SIZE, STEPS, CFG_SCALE, SAMPLING_STEPS = "DiT-S/4", 128, 1200, 2.0, 25
PROCESSES = 2
TRAINING = {
    "learning-rate": 5e-4,  # small and short: five times fast-DiT's
    "warmup-steps": 50,
    "max-grad-norm": 1,
    "global-batch-size": 32,
    "mixed_precision": "bf16",
    "log-every": 25,
    "ckpt-every": 200,
    "keep-ckpts": 1,
    "sample-every": 200,
    "num-samples": 6,
    "num-sampling-steps": SAMPLING_STEPS,
    "cfg-scale": CFG_SCALE,
}


def flags(**values) -> list[str]:
    """`num_samples=4` -> `--num-samples=4`."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def finished_run(results: Path, steps: int) -> Path | None:
    """The newest run in `results` that ended with a checkpoint of `steps` steps, whatever its number."""
    runs = [file.parent for file in sorted(results.glob(f"*-{MODEL.replace('/', '-')}/{FINISHED}"))]
    return next((run for run in reversed(runs) if numbered_runs.file_of(run, steps).is_file()), None)


def picture(archive: Path, real: Path, columns: int = 8) -> Image.Image:
    """A row of real and a row of generated images for each class; of balanced images, number n is of class n mod 3."""
    images, there = np.load(archive)["arr_0"], find(real)
    classes, rows, names = there.class_names, [], []
    for number, name in enumerate(classes):
        chosen = [index for index, label in enumerate(there.labels) if label == number][:columns]
        pixels = [to_uint8(there.pixel_values(index, SIZE)[None])[0].numpy() for index in chosen]
        for kind, part in (("real", pixels), ("DiT", images[number :: len(classes)][:columns])):
            rows.append([Image.fromarray(image) for image in part])
            names.append(f"{name}, {kind}")
    return image_grid(rows, row_names=names)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimiser steps (default {STEPS})")
    parser.add_argument("--seed", type=int, default=0, help="of the training and of the images (default 0)")
    parser.add_argument("--images", type=int, default=200, help="images of the .npz (default 200)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "demo-dit", help="folder of it all")
    options = parser.parse_args()
    out, minutes, started = options.out.resolve(), {}, time.perf_counter()

    def clock(stage: str) -> None:
        minutes[stage] = round((time.perf_counter() - started) / 60 - sum(minutes.values()), 2)

    if not (DATA / "train" / "raw.csv").exists():
        call("prepare.py", "chest-xray")
    for split in ("train", "val"):
        store = flags(data_path=DATA / split, features_path=out / split, image_size=SIZE, vae="nano", num_workers=0)
        call("extract_features.py", *store, processes=PROCESSES)
    clock("features")
    results = out / f"{options.steps}-steps-seed-{options.seed}"
    if not (run := finished_run(results, options.steps)):
        where = flags(features_path=out / "train", val_path=out / "val", results_dir=results, max_steps=options.steps)
        call("train.py", f"--model={MODEL}", *where, *flags(**TRAINING, global_seed=options.seed), "--no-flip")
        run = finished_run(results, options.steps)
        assert run, f"train.py has left no run of {options.steps} steps in {results}"
    clock("training")
    how = [
        f"--ckpt={numbered_runs.file_of(run, options.steps)}",
        "--balanced",
        "--sampler=dpm++",
        "--guided-channels=4",
    ]
    how += flags(num_fid_samples=options.images, cfg_scale=CFG_SCALE, num_sampling_steps=SAMPLING_STEPS)
    samples = results / "samples" / run.name  # another run has other weights, and its samples a folder of their own
    how += flags(per_proc_batch_size=20, global_seed=options.seed, precision="bf16", sample_dir=samples)
    call("sample_ddp.py", *how, processes=PROCESSES)
    clock("sampling")
    [archive] = samples.glob(f"*-{options.steps:07d}-*-cfg-{CFG_SCALE}-seed-{options.seed}.npz")
    picture(archive, DATA / "test").save(out / "demo-dit.png")
    images = np.load(archive)["arr_0"]
    losses = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    record = {
        "steps": options.steps,
        "images_seen": options.steps * TRAINING["global-batch-size"],
        "loss_validation": [line["loss_validation"] for line in losses if "loss_validation" in line],
        "npz_shape": list(images.shape),
        "minutes": minutes | {"all": round((time.perf_counter() - started) / 60, 1)},
    }
    (out / "demo-dit.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    print(f"picture: {named(out / 'demo-dit.png')}; images: {named(archive)}")


if __name__ == "__main__":
    with exit_codes():
        main()
