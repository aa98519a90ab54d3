"""Draw a few images: prompts and a LoRA (PixArt-alpha), or class labels (DiT).

    python sample.py --lora nano/lora-chest-xray --prompt "A chest X-ray image of bacterial pneumonia"
    python sample.py --lora medart --prompts prompts.txt --num-images 4 --seed 1 --out results/mine
    python sample.py --lora medart --lora style.safetensors --lora-scale 0.8 --lora-scale 0.5
    python sample.py --lora medart --merge results/pipeline    a full pipeline folder instead of images
    python sample.py --image-size 512 --seed 1                 the published DiT-XL/2
    python sample.py --model DiT-L/4 --image-size 256 --ckpt model.pt --class-labels 3 5

Which family is sampled, printed at the start: --model DiT-*, --ckpt or --class-labels mean DiT; --prompt, --prompts,
--lora or another --model mean PixArt; with none of them a finished run in medart/ is sampled (of the asked
--image-size, if one is asked), else DiT-XL/2 for sizes 256 and 512, else the bundled model.
An image depends on its prompt and seed only; with DiT on its class, the seed and its number.
"""

from medart_core.errors import UserError, exit_codes  # isort: skip (first, for a Ctrl-C while the rest loads)
import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medart_core import devices, dit_checkpoint, dit_sampling, lora, pretrained, sample_folder, tuned_model
from medart_core.checkpoint import FINISHED, disk_faults
from medart_core.medart_options import image_sides, resolution
from medart_core.options import Parser
from medart_core.pictures import image_grid
from medart_core.sampling import sample_images
from medart_core.text import MAX_TOKENS
from models import DiT_models

ROOT = Path(__file__).resolve().parent
DEFAULT_RUN = ROOT / "medart"
GRID_COLUMNS = 4  # where there is one image of each class
NANO_PROMPTS = ["a photo of a flower", "a photo of a ship", "a photo of a horse", "a photo of a frog"]


def parse_options() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    what = parser.add_argument_group("what to draw")
    what.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; repeatable")
    what.add_argument("--prompts", type=Path, metavar="FILE", help="text file with one prompt per line")
    what.add_argument("--negative-prompt", default="", metavar="TEXT", help="to move away from (default: nothing)")
    what.add_argument("--class-labels", nargs="+", default=[], metavar="CLASS", help="DiT's, by number or by name")
    what.add_argument(
        "--num-images", type=int, metavar="N", help="images per prompt (default: 4) or per class (default: 1)"
    )
    what.add_argument("--seed", type=int, default=0, help="seed of the first image of each prompt (default: 0)")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="NAME",
        help="PixArt folder or hub id (default: what the LoRA was made for), or DiT-XL/2 ...",
    )
    model.add_argument(
        "--lora", type=Path, action="append", metavar="PATH",
        help="output folder of medart.py, a checkpoint in it, or a .safetensors; repeatable: their sum",
    )  # fmt: skip
    model.add_argument(
        "--lora-scale", type=float, action="append", metavar="X", help="strength of each, or of all (default: 1)"
    )
    model.add_argument(
        "--random-weights", action="store_true", help="the published model's shapes without a download; draws noise"
    )
    model.add_argument("--ckpt", type=Path, metavar="FILE", help="DiT checkpoint (default: the published DiT-XL/2)")
    model.add_argument("--num-classes", type=int, metavar="N", help="DiT's classes (default: as the checkpoint)")
    model.add_argument(
        "--vae", metavar="NAME", help="DiT's decoder: mse, ema, nano, a folder (default: mse, or as in training)"
    )
    model.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on CUDA")
    add_sampler(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, metavar="DIR", help="new folder (default: next free results/sample-NNN)")
    output.add_argument(
        "--merge", type=Path, metavar="DIR", help="draw nothing: write the model with the LoRA merged to a new folder"
    )
    options = parser.parse_args()
    for name in ("num_images", "num_inference_steps", "batch_size"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}; give at least 1")
    if options.image_size is not None and min(height_and_width(options.image_size)) < 1:
        raise UserError(f"--image-size is {options.image_size}; give a side such as 256")
    return options


def add_sampler(parser: argparse.ArgumentParser) -> None:
    sampler = parser.add_argument_group("sampler")
    sampler.add_argument(
        "--num-inference-steps", type=int, default=20, metavar="N", help="DPM-Solver++ steps (default: 20)"
    )
    sampler.add_argument("--sampler", choices=dit_sampling.SAMPLERS, default="ddpm", help="DiT's (default: ddpm)")
    sampler.add_argument(
        "--num-sampling-steps", type=int, default=250, metavar="N", help="DiT's steps (default: 250; dpm++: 20 to 50)"
    )
    sampler.add_argument("--cfg-scale", type=float, metavar="X", help="guidance (default: 4.5, DiT 4; 1: none)")
    sampler.add_argument(
        "--guided-channels", type=int, choices=(3, 4), default=3, help="of DiT's noise (default: 3, as published)"
    )
    sampler.add_argument("--image-size", type=resolution, metavar="N|HxW", help="in pixels (default: as the model)")
    sampler.add_argument("--batch-size", type=int, default=4, metavar="N", help="images at a time (default: 4)")


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
        size = height_and_width(tuned_model.run_settings(run).get("resolution") or pretrained.NANO_SIZE)
        if options.image_size is None or height_and_width(options.image_size) == size:
            options.lora = [run]
            return "PixArt", f"PixArt with the finished run in {run.name}/"
    if options.image_size in (256, 512):
        return "DiT", f"DiT-XL/2, because of --image-size {options.image_size} and no finished run of that size"
    return "PixArt", "the bundled PixArt model nano/pixart"


def choose_prompts(options: argparse.Namespace, settings: dict) -> list[str]:
    """The prompts asked for, else those of the sample grids of the LoRA's run, else some for the bundled model."""
    prompts = list(options.prompt or [])
    if options.prompts:
        if not options.prompts.is_file():
            raise UserError(f"{options.prompts} is no file; give a text file with one prompt per line")
        try:
            lines = options.prompts.read_text("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{options.prompts} is not UTF-8 ({error}); save it as UTF-8 text") from error
        if not any(map(str.strip, lines)):
            raise UserError(f"{options.prompts} holds no prompts; write one per line")
        prompts += [line.strip() for line in lines if line.strip()]
    return prompts or settings.get("prompts") or settings.get("validation_prompt") or NANO_PROMPTS


def load_pixart(options: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> pretrained.PixArt:
    return tuned_model.load(
        options.lora, options.model, dtype, device,
        lora_scale=options.lora_scale or 1.0, random_weights=options.random_weights,
    )  # fmt: skip


def merge(options: argparse.Namespace) -> None:
    """Write a pipeline folder with the LoRA in the weights, computed in fp32 on the CPU."""
    if not options.lora:
        raise UserError("--merge has nothing to merge; give --lora")
    if options.merge.exists() and (options.merge.is_file() or any(options.merge.iterdir())):
        raise UserError(f"{options.merge} is not an empty folder; choose another --merge, or remove it")
    with disk_faults(options.merge, "remove what is there"):
        lora.merge(load_pixart(options, torch.float32, torch.device("cpu")), options.merge)
    names = " and ".join(map(str, options.lora))
    print(f"{names} merged: PixArtAlphaPipeline.from_pretrained({str(options.merge)!r}) loads it")


class Order(NamedTuple):
    """What is drawn: images as they come, what the table says of each, and the grid's rows and columns."""

    images: Iterable[Tensor]
    table: list[dict[str, Any]]
    row_names: list[str]
    columns: int


def order_pixart(options: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> Order:
    """Some images of each prompt."""
    settings = tuned_model.run_settings(options.lora[0]) if options.lora else {}
    prompts = choose_prompts(options, settings)
    model = load_pixart(options, dtype, device)
    size = height_and_width(options.image_size or model.image_size)
    step = 2 * model.vae_scale_factor
    if any(side % step for side in size):
        raise UserError(f"--image-size {options.image_size} does not fit the model; give a multiple of {step}")
    columns = options.num_images or 4
    table = [{"text": prompt, "seed": options.seed + n} for prompt in prompts for n in range(columns)]
    images = sample_images(
        model,
        [row["text"] for row in table],
        [row["seed"] for row in table],
        image_size=size,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=4.5 if options.cfg_scale is None else options.cfg_scale,
        negative_prompt=options.negative_prompt,
        max_token_length=settings.get("max_token_length") or MAX_TOKENS,
        batch_size=options.batch_size,
    )
    return Order(images, table, prompts, columns)


def order_dit(options: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> Order:
    """Some images of each class; with one of each, some classes to a row of the grid."""
    if options.image_size is not None and not isinstance(options.image_size, int):
        raise UserError(f"--image-size {options.image_size} is not square, as DiT's images are; give one number")
    torch.set_float32_matmul_precision("high")  # TF32 where fp32 is asked for on a GPU, as published
    model, weights = dit_checkpoint.open_model(
        DiT_models, options.ckpt, options.model, options.image_size, options.num_classes
    )
    names = weights.args.get("class_names") or []
    classes = dit_sampling.choose_labels(options.class_labels, model.num_classes, names)
    labels = [label for label in classes for _ in range(options.num_images or 1)]
    images = dit_sampling.sample_images(
        model.to(device, dtype),
        pretrained.load_vae(weights.vae(options.vae, "mse"), torch.float32, device),
        labels,
        range(len(labels)),
        seed=options.seed,
        batch_size=options.batch_size,
        sampler=options.sampler,
        num_steps=options.num_sampling_steps,
        cfg_scale=4.0 if options.cfg_scale is None else options.cfg_scale,
        guided_channels=options.guided_channels,
    )
    shown = [names[label] if names else str(label) for label in classes]
    columns = options.num_images or 1
    if columns == 1:
        columns = GRID_COLUMNS
        shown = [", ".join(shown[start : start + columns]) for start in range(0, len(shown), columns)]
    table = [{"label": label, "name": names[label] if names else "", "seed": options.seed} for label in labels]
    return Order(images, table, shown, columns)


def main() -> None:
    options = parse_options()
    family, reason = choose_family(options, DEFAULT_RUN)
    print(f"sampling {reason}", flush=True)
    if options.merge:
        return merge(options)
    out = sample_folder.choose(options.out, ROOT / "results")
    device = devices.pick_device()
    bf16 = options.precision == "bf16" or (options.precision == "auto" and device.type == "cuda")
    dtype, remark = devices.pick_dtype("bf16" if bf16 else "no", device)
    if remark:
        print(remark)
    order = order_dit(options, dtype, device) if family == "DiT" else order_pixart(options, dtype, device)
    pictures = sample_folder.write(out, order.images, order.table)
    rows = [pictures[start : start + order.columns] for start in range(0, len(pictures), order.columns)]
    image_grid(rows, row_names=order.row_names, cell=min(pictures[0].width, 256)).save(out / "grid.png")
    print(f"{len(pictures)} images, samples.csv and grid.png in {out}")


if __name__ == "__main__":
    with exit_codes():
        sys.exit(main())
