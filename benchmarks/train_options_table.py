"""Speed and memory of train.py with and without recomputation, 16 bits and features, on this machine; JSON comes last.

    python benchmarks/train_options_table.py            DiT-XL/2, batch 128 on a GPU; DiT-S/4, batch 8 on a CPU
    python benchmarks/train_options_table.py --model DiT-B/2 --batch-size 64 --steps 20

The rows are fast-DiT's table, whose figures on an A100 (as published, global batch 128) stand beside the measured
ones. Images are random, of 256 px; they go through the sd-vae-ft architecture with random weights.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from medart_core import feature_store, labelled_images
from medart_core.errors import exit_codes
from medart_core.options import Parser

ROOT = Path(__file__).resolve().parents[1]
SIZE = 256
# Recomputation, mixed precision, features -> published steps per second and MB.
PUBLISHED: dict[tuple[bool, bool, bool], tuple[float, int] | None] = {
    (False, False, False): None,  # out of memory
    (True, False, False): (0.43, 44_045),
    (True, True, False): (0.56, 40_461),
    (True, True, True): (0.84, 27_485),
    (False, True, True): None,  # not in that table: train.py's own way
}
COLUMNS = ("recomputed", "16 bits", "features", "steps/s", "images/s", "peak GB", "MFU of data sheet",
           "MFU of measured product", "A100, published: steps/s", "MB")  # fmt: skip
VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "sample_size": SIZE,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


def prepare(folder: Path, count: int) -> None:
    """Random images in four class folders, random moments of them, and a VAE."""
    draws = np.random.default_rng(0)
    for number in range(count):
        file = folder / "images" / f"class{number % 4}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(draws.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        small.resize((SIZE, SIZE)).save(file, compress_level=1)
    torch.manual_seed(0)
    AutoencoderKL(**VAE).save_pretrained(folder / "vae")
    images = labelled_images.find(folder / "images")
    facts = {"vae": str(folder / "vae"), "image_size": SIZE, "scaling_factor": 0.18215}
    feature_store.begin(folder / "features", images, facts, (count, 2, 2, 4, SIZE // 8, SIZE // 8))
    extraction = feature_store.Extraction(folder / "features")
    for group in extraction.pending():
        extraction.write(group, torch.rand(feature_store.GROUP, 2, 2, 4, SIZE // 8, SIZE // 8))
    extraction.flush()
    extraction.publish()


def measure(folder: Path, row: tuple[bool, bool, bool], options: argparse.Namespace) -> dict[str, Any]:
    """Run train.py on one row's options; the second line of its log counts, the first one warms up."""
    recompute, mixed, features = row
    results = folder / "-".join(map(str, row))
    data = [f"--features-path={folder / 'features'}"] if features else [f"--data-path={folder / 'images'}"]
    command = [
        sys.executable, str(ROOT / "train.py"), *data, f"--vae={folder / 'vae'}", f"--model={options.model}",
        f"--global-batch-size={options.batch_size}", f"--micro-batch-size={options.batch_size}", "--num-samples=0",
        f"--gradient-checkpointing={'full' if recompute else 'none'}", f"--results-dir={results}", "--report-to=none",
        f"--mixed_precision={'bf16' if mixed else 'no'}", f"--max-steps={2 * options.steps}", "--sample-every=0",
        f"--log-every={options.steps}", "--ckpt-every=1000000",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        out_of_memory = "OutOfMemoryError" in done.stderr
        return {"failed": "out of memory" if out_of_memory else (done.stderr.strip().splitlines() or ["?"])[-1]}
    [run] = results.iterdir()
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for file in (run / "checkpoints").iterdir():
        file.unlink()
    names = ("steps_per_sec", "images_per_sec", "peak_mem_gb", "mfu_of_data_sheet", "mfu_of_measured")
    return {name: lines[1][name] and round(lines[1][name], 4) for name in names}


def text(row: tuple[bool, bool, bool], result: dict[str, Any]) -> str:
    """A line of the table."""
    cells = ["yes" if part else "no" for part in row]
    if "failed" in result:
        cells += [result["failed"], "", "", "", ""]
    else:
        share = [result["mfu_of_data_sheet"], result["mfu_of_measured"]]
        cells += [f"{result['steps_per_sec']:.3f}", f"{result['images_per_sec']:.3g}", f"{result['peak_mem_gb']:.2f}"]
        cells += ["unknown" if part is None else f"{100 * part:.1f} %" for part in share]
    published = PUBLISHED[row]
    first = "out of memory" if row == (False, False, False) else "not published"
    cells += [f"{published[0]}", f"{published[1]:,}"] if published else [first, ""]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="DiT-XL/2" if cuda else "DiT-S/4", help="(default: see above)")
    parser.add_argument("--batch-size", type=int, default=128 if cuda else 8, metavar="N", help="global batch")
    parser.add_argument("--steps", type=int, default=20 if cuda else 2, metavar="N", help="timed steps, after as many")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{options.model}, batch {options.batch_size}, {SIZE} px, on {device}\n", flush=True)
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    document: dict[str, Any] = {"device": device, "torch": torch.__version__, **vars(options), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), max(64, options.batch_size))
        for row in PUBLISHED:
            result = measure(Path(folder), row, options)
            print(text(row, result), flush=True)
            document["rows"].append(dict(zip(("recomputed", "bf16", "features"), row, strict=True)) | result)
    print("\nPeak GB: of the GPU, else of the whole process. The last row is train.py's own way, not in that table.")
    print(json.dumps(document))


if __name__ == "__main__":
    with exit_codes():
        main()
