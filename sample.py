"""Draw a few images: prompts and a LoRA (PixArt-alpha), or class labels (DiT, not part of this version yet).

    python sample.py --lora nano/lora-chest-xray --prompt "A chest X-ray image of bacterial pneumonia"
    python sample.py --lora medart --prompts prompts.txt --num-images 4 --seed 1 --out results/mine
    python sample.py --lora medart --merge results/pipeline    a full pipeline folder instead of images

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

import torch
from PIL import Image
from tqdm import tqdm

from medart_core import full_size, lora_file, pretrained
from medart_core.checkpoint import FINISHED, OPTIONS
from medart_core.errors import UserError, exit_codes
from medart_core.medart_options import image_sides, resolution
from medart_core.pictures import image_grid
from medart_core.sampling import sample_images
from medart_core.text import MAX_TOKENS

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
        "--lora", type=Path, metavar="PATH", help="output folder of medart.py, a checkpoint in it, or a .safetensors"
    )
    model.add_argument("--lora-scale", type=float, default=1.0, metavar="X", help="the LoRA's strength (default: 1)")
    model.add_argument(
        "--random-weights", action="store_true", help="the published model's shapes without a download; draws noise"
    )
    model.add_argument("--ckpt", type=Path, metavar="FILE", help="DiT checkpoint")
    model.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on CUDA")
    sampler = parser.add_argument_group("sampler")
    sampler.add_argument(
        "--num-inference-steps", type=int, default=20, metavar="N", help="DPM-Solver++ steps (default: 20)"
    )
    sampler.add_argument("--cfg-scale", type=float, default=4.5, metavar="X", help="guidance (default: 4.5; 1: none)")
    sampler.add_argument(
        "--image-size",
        type=resolution,
        metavar="PIXELS",
        help="side, or height x width: 384x640 (default: as the model)",
    )
    sampler.add_argument("--batch-size", type=int, default=4, metavar="N", help="images at a time (default: 4)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="new folder (default: the next free results/sample-NNN)"
    )
    parser.add_argument(
        "--merge", type=Path, metavar="DIR", help="draw nothing: write the model with the LoRA merged to a new folder"
    )
    options = parser.parse_args()
    for name in ("num_images", "num_inference_steps", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}; give at least 1")
    return options


def read_json(file: Path) -> dict:
    """The object in a small JSON file; empty when there is none."""
    try:
        content = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); remove it to sample without what it says") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not of medart.py; remove it to sample without what it says")
    return content


def run_settings(lora: Path) -> dict:
    """What the run of a LoRA says of itself: its options, under what it wrote when it was finished.

    `lora` is the run's folder, the file in it or a checkpoint; empty for a LoRA that lies elsewhere.
    """
    folder = (lora.parent if lora.is_file() else lora).resolve()
    for run in (folder, folder.parent):
        if settings := read_json(run / OPTIONS) | read_json(run / FINISHED):
            return settings
    return {}


def height_and_width(size: int | str | list[int]) -> tuple[int, int]:
    """An image's sides from a resolution as the command line, options.json or finished.json has it."""
    sides = (size[0], size[1]) if isinstance(size, list) else image_sides(size)
    return sides if isinstance(sides, tuple) else (sides, sides)


def choose_family(options: argparse.Namespace, run: Path) -> tuple[str, str]:
    """`DiT` or `PixArt`, and the reason to print; sets `options.lora` when a finished run is taken up."""
    if (options.model or "").startswith("DiT-") or options.ckpt or options.class_labels:
        return "DiT", "DiT, because of --model, --ckpt or --class-labels"
    if options.prompt or options.prompts or options.lora or options.model or options.random_weights:
        return "PixArt", "PixArt, because of --prompt, --prompts, --lora, --model or --random-weights"
    if (run / FINISHED).is_file():
        size = height_and_width(run_settings(run).get("resolution") or pretrained.NANO_SIZE)
        if options.image_size is None or height_and_width(options.image_size) == size:
            options.lora = run
            return "PixArt", f"PixArt with the finished run in {run.name}/"
    if options.image_size in (256, 512):
        return "DiT", f"DiT-XL/2, because of --image-size {options.image_size} and no finished run of that size"
    return "PixArt", "the bundled PixArt model nano/pixart"


def choose_prompts(options: argparse.Namespace, settings: dict) -> list[str]:
    """The prompts asked for, else those of the sample grids of the LoRA's run, else some for the bundled model."""
    prompts = list(options.prompt or [])
    if options.prompts:
        if not options.prompts.is_file():
            raise UserError(f"{options.prompts} does not exist; give a text file with one prompt per line")
        try:
            lines = options.prompts.read_text("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{options.prompts} is not UTF-8 ({error}); save it as UTF-8 text") from error
        prompts += [line.strip() for line in lines if line.strip()]
    return prompts or settings.get("prompts") or settings.get("validation_prompt") or NANO_PROMPTS


def load_model(options: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> pretrained.PixArt:
    """The base model with the LoRA on it."""
    adapters = lora_file.read(options.lora) if options.lora else {}
    name = options.model or lora_file.base_model(adapters)
    if options.random_weights or name == full_size.NAME:
        model = full_size.build_random(dtype, device)
    else:
        model = pretrained.load(name, dtype, device)
    lora_file.apply(model, adapters, options.lora_scale)
    return model


def merge(options: argparse.Namespace) -> None:
    """Write a pipeline folder with the LoRA in the weights, computed in fp32 on the CPU."""
    if not options.lora:
        raise UserError("--merge has nothing to merge; give --lora")
    if options.merge.exists() and (options.merge.is_file() or any(options.merge.iterdir())):
        raise UserError(f"{options.merge} is not an empty folder; choose another --merge, or remove it")
    lora_file.merge(load_model(options, torch.float32, torch.device("cpu")), options.merge)
    print(f"{options.lora} merged: PixArtAlphaPipeline.from_pretrained({str(options.merge)!r}) loads it")


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
    family, reason = choose_family(options, DEFAULT_RUN)
    print(f"sampling {reason}", flush=True)
    if family == "DiT":
        raise UserError("class-conditional DiT sampling is not part of this version yet; use --prompt or --lora")
    if options.merge:
        return merge(options)
    settings = run_settings(options.lora) if options.lora else {}
    prompts = choose_prompts(options, settings)
    out = choose_folder(options.out)
    device = pretrained.pick_device()
    bf16 = options.precision == "bf16" or (options.precision == "auto" and device.type == "cuda")
    dtype, remark = pretrained.pick_dtype("bf16" if bf16 else "no", device)
    if remark:
        print(remark)
    model = load_model(options, dtype, device)
    size = height_and_width(options.image_size or model.image_size)
    step = 2 * model.vae_scale_factor
    if any(side <= 0 or side % step for side in size):
        raise UserError(f"--image-size {options.image_size} does not fit the model; give a multiple of {step}")
    jobs = [(prompt, options.seed + n) for prompt in prompts for n in range(options.num_images)]
    images = sample_images(
        model,
        [prompt for prompt, _ in jobs],
        [seed for _, seed in jobs],
        image_size=size,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.cfg_scale,
        negative_prompt=options.negative_prompt,
        max_token_length=settings.get("max_token_length") or MAX_TOKENS,
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
    image_grid(rows, row_names=prompts, cell=min(pictures[0].width, 256)).save(out / "grid.png")
    print(f"{len(pictures)} images, samples.csv and grid.png in {out}")


if __name__ == "__main__":
    with exit_codes():
        sys.exit(main())
