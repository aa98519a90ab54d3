"""What VSG's captions change: medart.py on them and on the simple ones, equal steps and seeds, by what medart.py logs.

    python nano/compare_captions.py                     describes the chest X-rays if need be; hours on 2 cores
    python nano/compare_captions.py --steps 240 --seeds 0 1

Each run is validated on the held-out images with captions of its own kind, at the same noise. The colour distance is
that of the HLDF updates in the last third of the steps: the average channel means and standard deviations of the
sampled images against those of the real ones. Writes compare.json. Run it again after an interruption: it goes on.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from recipe import ROOT, describe, finetune

sys.path.insert(0, str(ROOT))
from medart_core import training_data
from medart_core.errors import exit_codes

COLUMNS = {"simple captions": "simple_text", "VSG captions": "text"}
STATISTICS = [f"{statistic}_{channel}" for statistic in ("mean", "std") for channel in "rgb"]


def figures(run: Path, steps: int) -> dict[str, float]:
    """The last validation loss of a run, and the colour distance in the last third of its steps."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    validation = [entry["loss_validation"] for entry in entries if "loss_validation" in entry]
    late = [entry for entry in entries if "loss_color" in entry and entry["step"] >= steps * 2 / 3]
    means = {side: [np.mean([entry[f"{side}_{name}"] for entry in late]) for name in STATISTICS]
             for side in ("generated", "real")}  # fmt: skip
    distance = np.linalg.norm(np.subtract(means["generated"], means["real"]))
    return {"loss_validation": validation[-1], "loss_validation_at_first": validation[0],
            "color_distance": float(distance)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=480, help="optimiser steps of each run (default 480)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs (default 0 1 2)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "captions", help="folder of the runs")
    options = parser.parse_args()
    training = Path(training_data.locate(None))
    describe(training.parent)
    result: dict = {"steps": options.steps, "seeds": options.seeds, "runs": {}, "mean": {}}
    for kind, column in COLUMNS.items():
        runs = []
        for seed in options.seeds:
            run = options.out / f"{column}-seed-{seed}"
            finetune(run, options.steps, seed, caption_column=column)
            runs.append(figures(run, options.steps))
        result["runs"][kind] = runs
        result["mean"][kind] = {name: round(float(np.mean([run[name] for run in runs])), 4) for name in runs[0]}
    (options.out / "compare.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"| mean of {len(options.seeds)} seeds, {options.steps} steps | " + " | ".join(COLUMNS) + " |")
    print("|---|---|---|")
    for name in ("loss_validation", "color_distance"):
        low_high = [[run[name] for run in result["runs"][kind]] for kind in COLUMNS]
        cells = [f"{np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})" for values in low_high]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(f"written: {options.out / 'compare.json'}")


if __name__ == "__main__":
    with exit_codes():
        main()
