"""Draw a few images: prompts and a LoRA (PixArt-alpha), or class labels (DiT, not part of this version yet).

    python sample.py --lora nano/lora-chest-xray --prompt "A chest X-ray image of bacterial pneumonia"
    python sample.py --lora medart --prompts prompts.txt --num-images 4 --seed 1 --out results/mine

Which family is sampled, printed at the start: --model DiT-*, --ckpt or --class-labels mean DiT; --prompt, --prompts,
--lora or another --model mean PixArt; with none of them a finished run in medart/ is sampled (of the asked
--image-size, if one is asked), else DiT-XL/2 for sizes 256 and 512, else the bundled model.
An image depends on its prompt and seed only.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from medart_core import lora, pretrained
from medart_core.checkpoint import FINISHED, OPTIONS
from medart_core.errors import UserError, exit_codes
from medart_core.pictures import image_grid
from medart_core.sampling import sample_images

ROOT = Path(__file__).resolve().parent
DEFAULT_RUN = ROOT / "medart"
NANO_PROMPTS = ["a photo of a flower", "a photo of a ship", "a photo of a horse", "a photo of a frog"]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to draw")
    what.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; repeatable")
    what.add_argument("--prompts", type=Path, metavar="FILE", help="text file with one prompt per line")
    what.add_argument(
        "--negative-prompt", default="", metavar="TEXT", help="what to move away from (default: nothing)"
    )
    what.add_argument("--num-images", type=int, default=4, metavar="N", help="images per prompt (default: 4)")
    what.add_argument("--seed", type=int, default=0, help="seed of the first image of each prompt (default: 0)")
    what.add_argument("--class-labels", type=int, nargs="+", metavar="N", help="classes for DiT")
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="NAME", help="PixArt folder or hub id (default: what the LoRA was made for)")
    model.add_argument(
        "--lora", type=Path, metavar="DIR", help="output folder of medart.py, or one of its checkpoints"
    )
    model.add_argument("--ckpt", type=Path, metavar="FILE", help="DiT checkpoint")
    model.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on CUDA")
    sampler = parser.add_argument_group("sampler")
    sampler.add_argument(
        "--num-inference-steps", type=int, default=20, metavar="N", help="DPM-Solver++ steps (default: 20)"
    )
    sampler.add_argument("--cfg-scale", type=float, default=4.5, metavar="X", help="guidance (default: 4.5; 1: none)")
    sampler.add_argument("--image-size", type=int, metavar="PIXELS", help="side of the images (default: as trained)")
    sampler.add_argument("--batch-size", type=int, default=4, metavar="N", help="images at a time (default: 4)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="new folder (default: the next free results/sample-NNN)"
    )
    options = parser.parse_args()
    for name in ("num_images", "num_inference_steps", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}; give at least 1")
    return options


def read_json(file: Path) -> dict:
    """A small JSON file's content; empty when there is none."""
    return json.loads(file.read_text()) if file.is_file() else {}


def choose_family(options: argparse.Namespace, run: Path = DEFAULT_RUN) -> tuple[str, str]:
    """`DiT` or `PixArt`, and the reason to print; sets `options.lora` when a finished run is taken up."""
    if (options.model or "").startswith("DiT-") or options.ckpt or options.class_labels:
        return "DiT", "DiT, because of --model, --ckpt or --class-labels"
    if options.prompt or options.prompts or options.lora or options.model:
        return "PixArt", "PixArt, because of --prompt, --prompts, --lora or --model"
    if (run / FINISHED).is_file():
        size = read_json(run / OPTIONS).get("resolution") or pretrained.NANO_SIZE
        if options.image_size in (None, size):
            options.lora = run
            return "PixArt", f"PixArt with the finished run in {run.name}/"
    if options.image_size in (256, 512):
        return "DiT", f"DiT-XL/2, because of --image-size {options.image_size} and no finished run of that size"
    return "PixArt", "the bundled PixArt model nano/pixart"


def choose_prompts(options: argparse.Namespace) -> list[str]:
    """The prompts asked for, else those of the LoRA's own sample grids, else some for the bundled model."""
    prompts = list(options.prompt or [])
    if options.prompts:
        if not options.prompts.is_file():
            raise UserError(f"{options.prompts} does not exist; give a text file with one prompt per line")
        prompts += [line.strip() for line in options.prompts.read_text("utf-8").splitlines() if line.strip()]
    if options.lora and not prompts:
        prompts = read_json(options.lora / FINISHED).get("prompts", [])
    return prompts or NANO_PROMPTS


def load_model(options: argparse.Namespace) -> pretrained.PixArt:
    """The base model with the LoRA on it."""
    device = pretrained.pick_device()
    precision = options.precision if options.precision != "auto" else "bf16" if device.type == "cuda" else "fp32"
    dtype, remark = pretrained.pick_dtype("bf16" if precision == "bf16" else "no", device)
    if remark:
        print(remark)
    folders = lora.find(options.lora) if options.lora else (None, None)
    model = pretrained.load(options.model or lora.base_model(folders), dtype, device)
    model.transformer = lora.load(model.transformer, folders[0])
    model.text_encoder = lora.load(model.text_encoder, folders[1])
    return model


def choose_folder(out: Path | None) -> Path:
    """A folder without samples in it: finished samples are never overwritten."""
    if out is None:
        out = next(path for n in range(1, 10_000) if not (path := ROOT / "results" / f"sample-{n:03d}").exists())
    if (out / "samples.csv").exists():
        raise UserError(f"{out} holds samples already; choose another --out, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    return out


def main() -> None:
    options = parse_options()
    family, reason = choose_family(options)
    print(f"sampling {reason}", flush=True)
    if family == "DiT":
        raise UserError("class-conditional DiT sampling is not part of this version yet; use --prompt or --lora")
    prompts = choose_prompts(options)
    out = choose_folder(options.out)
    model = load_model(options)
    size = options.image_size or model.image_size
    if size % (2 * model.vae_scale_factor):
        raise UserError(f"--image-size {size} does not fit the model; give a multiple of {2 * model.vae_scale_factor}")
    jobs = [(prompt, options.seed + n) for prompt in prompts for n in range(options.num_images)]
    images = sample_images(
        model,
        [prompt for prompt, _ in jobs],
        [seed for _, seed in jobs],
        image_size=size,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.cfg_scale,
        negative_prompt=options.negative_prompt,
        batch_size=options.batch_size,
    )
    pictures = []
    with open(out / "samples.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text", "seed"])
        for number, (job, image) in enumerate(zip(jobs, tqdm(images, "sampling", len(jobs)), strict=True)):
            pictures.append(Image.fromarray(image.numpy()))
            pictures[-1].save(out / f"{number:06d}.png")
            table.writerow([f"{number:06d}.png", *job])
    columns = options.num_images
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    image_grid(rows, row_names=prompts, cell=min(size, 256)).save(out / "grid.png")
    print(f"{len(pictures)} images, samples.csv and grid.png in {out}")


if __name__ == "__main__":
    with exit_codes():
        sys.exit(main())
