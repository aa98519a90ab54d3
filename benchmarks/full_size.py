"""Seconds per step and peak memory of medart.py at the published shapes on a GPU, for each memory preset.

    python benchmarks/full_size.py --presets 24gb 80gb

The published command runs on random weights with the bundled X-rays; the last line is JSON. The first steps of each
kind warm up and don't count.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from medart_core import full_size, plan
from medart_core.errors import UserError, exit_codes
from medart_core.options import Parser

ROOT = Path(__file__).resolve().parents[1]
N_STEPS = 8  # an HLDF step at 0 and every 8th; with two HLDF steps to warm up
FLAGS = [
    "--random_weights", "--mixed_precision=bf16", "--resolution=512", "--train_batch_size=1", "--rank=8",
    "--use_8bit_adam", "--learning_rate=1e-4", "--seed=42", "--max_token_length=120", "--M_times=20",
    f"--N_steps={N_STEPS}", "--logging_steps=1", "--report_to=none", "--num_validation_images=1",
    "--validation_prompt=a chest x-ray", "--validation_steps=0",
]  # fmt: skip


def measure(preset: str, hldf_steps: int) -> dict:
    """Run medart.py with a preset, and read what its log says."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        own = [f"--preset={preset}", f"--max_train_steps={(2 + hldf_steps) * N_STEPS}", f"--output_dir={out}"]
        command = [sys.executable, str(ROOT / "medart.py"), *FLAGS, f"--dataset_name={ROOT / 'tests' / 'data'}", *own]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
        entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    warm = [entry for entry in entries if entry["step"] > 2 * N_STEPS - 1]
    seconds = {
        kind: round(statistics.median(entry[kind] for entry in warm if kind in entry), 4)
        for kind in ("sec_per_step", "sec_per_hldf_step")
    }
    return seconds | {"peak_mem_gb": round(max(entry["peak_mem_gb"] for entry in entries), 2)}


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--presets", nargs="+", choices=plan.PRESETS, default=list(plan.PRESETS), help="which (all)")
    parser.add_argument("--hldf-steps", type=int, default=3, metavar="N", help="HLDF steps that count (default: 3)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("no CUDA device here; on a CPU use: python -m pytest -m slow -s tests/test_full_size.py")
    shapes, result = plan.Shapes.of(*full_size.build_empty()), {}
    for preset in options.presets:
        predicted = plan.predict(shapes, use_8bit_adam=True, **plan.PRESETS[preset])["peak"]
        result[preset] = measure(preset, options.hldf_steps) | {"predicted_peak_gb": round(predicted, 2)}
        print(preset, result[preset], flush=True)
    print(json.dumps({"device": torch.cuda.get_device_name(), "M": 20, "presets": result}))


if __name__ == "__main__":
    with exit_codes():
        main()
