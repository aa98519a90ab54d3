"""Draw many images with any number of processes, for FID: a folder of PNG files, and an .npz for ADM's evaluator.

    torchrun --nnodes=1 --nproc_per_node=N sample_ddp.py --model DiT-XL/2 --num-fid-samples 50000
    python sample_ddp.py --ckpt results/000-DiT-S-4/checkpoints/0005000.pt --vae nano --num-fid-samples 200 --balanced
    torchrun --nproc_per_node=2 sample_ddp.py --lora medart --metadata dataset/kvasir/test --num-fid-samples 4000

An image depends on its number, the seed, and its class or prompt. Work is cut by number into groups of
--per-proc-batch-size, so any number of processes makes the same images, bit for bit; another batch size changes them
by a grey level at most. On a CPU each process uses one core. After an interruption the same command goes on.
"""

from medart_core.errors import UserError, exit_codes  # isort: skip (first, for a Ctrl-C while the rest loads)
import argparse
import hashlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from medart_core import (
    devices,
    dit_checkpoint,
    dit_sampling,
    metadata,
    pretrained,
    sampling,
    seeds,
    stopping,
    tuned_model,
)
from medart_core.many_samples import SampleStore, fingerprint
from medart_core.options import Parser
from medart_core.text import MAX_TOKENS
from models import DiT_models


def parse_options() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    what = parser.add_argument_group("what to draw")
    what.add_argument("--num-fid-samples", type=int, default=50_000, metavar="N", help="images (default: 50000)")
    what.add_argument(
        "--sample-dir", type=Path, default=Path("samples"), metavar="DIR", help="where they go (default: samples)"
    )
    what.add_argument("--no-png", action="store_true", help="make the .npz only")
    what.add_argument("--global-seed", type=int, default=0, metavar="N", help="of noise and classes (default: 0)")
    what.add_argument("--balanced", action="store_true", help="all classes equally often, in turn")
    what.add_argument("--metadata", type=Path, metavar="PATH", help="metadata.csv, or its folder: PixArt's prompts")
    what.add_argument(
        "--caption-column", default="text", metavar="NAME", help="of the prompts (default: text); none: no words"
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="NAME", help="DiT-XL/2 ... (default: the checkpoint's), or PixArt's folder")
    model.add_argument("--ckpt", type=Path, metavar="FILE", help="DiT checkpoint (default: the published DiT-XL/2)")
    model.add_argument("--num-classes", type=int, metavar="N", help="DiT's classes (default: as the checkpoint)")
    model.add_argument(
        "--vae", metavar="NAME", help="DiT's decoder: ema, mse, nano, a folder (default: ema, or as in training)"
    )
    model.add_argument("--lora", type=Path, metavar="PATH", help="draw from PixArt with this LoRA")
    model.add_argument("--lora-scale", type=float, default=1.0, metavar="X", help="its strength (default: 1)")
    sampler = parser.add_argument_group("sampler")
    sampler.add_argument("--image-size", type=int, metavar="PIXELS", help="side (default: as the model)")
    sampler.add_argument("--cfg-scale", type=float, metavar="X", help="guidance (default: 1.5, PixArt 4.5; 1: none)")
    sampler.add_argument("--sampler", choices=dit_sampling.SAMPLERS, default="ddpm", help="DiT's (default: ddpm)")
    sampler.add_argument("--num-sampling-steps", type=int, metavar="N", help="steps (default: 250, PixArt 20)")
    sampler.add_argument("--guided-channels", type=int, choices=(3, 4), default=3, help="of DiT's noise (default: 3)")
    speed = parser.add_argument_group("speed")
    speed.add_argument("--per-proc-batch-size", type=int, default=32, metavar="N", help="at a time (default: 32)")
    speed.add_argument(
        "--precision", choices=("fp32", "bf16"), help="of the network (default: fp32, PixArt bf16 on CUDA)"
    )
    speed.add_argument(
        "--tf32", action=argparse.BooleanOptionalAction, default=True, help="fp32 products on tensor cores (default)"
    )
    speed.add_argument("--compile", action="store_true", help="compile DiT's blocks: worth it for thousands of images")
    options = parser.parse_args()
    for name in ("num_fid_samples", "per_proc_batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}; give at least 1")
    if options.image_size is not None and options.image_size < 1:
        raise UserError(f"--image-size is {options.image_size}; give a side such as 256")
    if options.cfg_scale is not None and options.cfg_scale < 1:
        raise UserError(f"--cfg-scale is {options.cfg_scale}; give at least 1, which is no guidance")
    if options.metadata and not (options.lora or options.model):
        raise UserError("--metadata has prompts for PixArt; give its --lora or its --model")
    return options


class Source(NamedTuple):
    """Where images come from: a name for them, their sides, how they are made, what each shows, and the drawing.

    `draw` makes a group of images from a range of numbers: (n, H, W, 3) uint8.
    """

    name: str
    size: tuple[int, int]
    settings: dict[str, Any]
    table: list[dict[str, Any]]
    draw: Callable[[range], Tensor]


def dit_source(options: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> Source:
    """Classes, drawn for each image or in turn."""
    model, weights = dit_checkpoint.open_model(
        DiT_models, options.ckpt, options.model, options.image_size, options.num_classes
    )
    mark = fingerprint(model)
    side = model.input_size * dit_checkpoint.VAE_SCALE_FACTOR
    decoder = pretrained.vae_name(weights.vae(options.vae, "ema"))
    vae = pretrained.load_vae(decoder, torch.float32, device)
    model.to(device, dtype)
    if options.compile:
        model.compile_blocks()
    scale = 1.5 if options.cfg_scale is None else options.cfg_scale
    steps = options.num_sampling_steps or 250
    labels = dit_sampling.draw_labels(
        options.num_fid_samples, model.num_classes, options.global_seed, options.balanced
    )
    sampler = {"sampler": options.sampler, "num_steps": steps, "guided_channels": options.guided_channels}
    settings = {"model": mark, "precision": str(dtype), "balanced": options.balanced, "vae": decoder, **sampler}

    def draw(rows: range) -> Tensor:
        chosen = [labels[row] for row in rows]
        shared = {"seed": options.global_seed, "batch_size": options.per_proc_batch_size, "cfg_scale": scale}
        return torch.stack([*dit_sampling.sample_images(model, vae, chosen, rows, **shared, **sampler)])

    name = options.model or weights.args.get("model") or dit_checkpoint.PUBLISHED
    ckpt = options.ckpt.stem if options.ckpt else "pretrained"
    facts = f"size-{side}-vae-{Path(decoder).name}-cfg-{scale}-seed-{options.global_seed}"
    names = weights.args.get("class_names") or [""] * model.num_classes
    table = [{"label": label, "name": names[label]} for label in labels]
    return Source(f"{name.replace('/', '-')}-{ckpt}-{facts}", (side, side), settings, table, draw)


def read_prompts(path: Path, column: str) -> tuple[list[str], list[str]]:
    """The captions of a metadata file or of its folder, and their labels where it has that column."""
    folder, files = (path.parent, (path.name,)) if path.is_file() else (path, metadata.METADATA_FILES)
    captions = [caption for _, caption in metadata.read_metadata(folder, column, files=files)]
    try:
        return captions, [label for _, label in metadata.read_metadata(folder, "label", "label", files)]
    except UserError:
        return captions, []


def pixart_source(options: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> Source:
    """The captions of a set in turn."""
    if not options.metadata:
        raise UserError("PixArt needs prompts; give a metadata.csv or its folder as --metadata")
    captions, labels = read_prompts(options.metadata, options.caption_column)
    if options.balanced:
        captions, labels = sampling.classes_in_turn(captions, labels)
    model = tuned_model.load(options.lora, options.model, dtype, device, lora_scale=options.lora_scale)
    run = tuned_model.run_settings(options.lora) if options.lora else {}
    side = options.image_size or model.image_size
    scale = 4.5 if options.cfg_scale is None else options.cfg_scale
    steps = options.num_sampling_steps or 20
    prompts = [captions[row % len(captions)] for row in range(options.num_fid_samples)]

    def draw(rows: range) -> Tensor:
        images = sampling.sample_images(
            model,
            [prompts[row] for row in rows],
            [seeds.generator(options.global_seed, dit_sampling.NOISE_STREAM, row).initial_seed() for row in rows],
            image_size=side,
            num_inference_steps=steps,
            guidance_scale=scale,
            max_token_length=run.get("max_token_length") or MAX_TOKENS,
            batch_size=options.per_proc_batch_size,
        )
        return torch.stack([*images])

    mark = fingerprint(model.transformer, model.text_encoder)
    digest = hashlib.sha256("\n".join(captions).encode()).hexdigest()[:16]
    settings = {"model": mark, "precision": str(dtype), "num_steps": steps, "prompts": digest}
    lora = options.lora.resolve().stem if options.lora else "base"
    name = f"PixArt-{lora}-size-{side}-cfg-{scale}-seed-{options.global_seed}"
    table: list[dict[str, Any]] = [{"text": prompt} for prompt in prompts]
    for row, facts in enumerate(table if labels else ()):
        facts["label"] = labels[row % len(labels)]
    return Source(name, (side, side), settings, table, draw)


def draw(source: Source, rows: range) -> Tensor:
    try:
        return source.draw(rows)
    except torch.OutOfMemoryError as error:
        raise UserError("the GPU's memory is too small for a group; lower --per-proc-batch-size") from error


def main() -> None:
    options = parse_options()
    stopping.end_with_launcher()
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=2))
    device = torch.device(state.device or "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.tf32
    torch.set_num_threads(1)  # another number changes the last bits
    is_dit = not options.lora and (options.model is None or options.model.startswith("DiT-"))
    bf16 = options.precision == "bf16" or (options.precision is None and device.type == "cuda" and not is_dit)
    dtype, remark = devices.pick_dtype("bf16" if bf16 else "no", device)
    state.print(remark or f"computing in {str(dtype).removeprefix('torch.')}")

    # 1. The model; the first process fetches what is not there yet.
    with stopping.first_process_first(device):
        source = (dit_source if is_dit else pixart_source)(options, dtype, device)

    # 2. What is there already, and groups of images that are not, cut by number and shared out.
    shape = (options.num_fid_samples, *source.size, 3)
    store = SampleStore(options.sample_dir, source.name, shape, png=not options.no_png)
    todo = True
    with stopping.first_process_first(device):
        if state.is_main_process:
            todo = store.begin(source.settings)
        todo = todo and store.work.exists()
    if not todo:
        return state.print(f"{store.target} is there already, with its {options.num_fid_samples} images")
    missing = store.missing()
    groups = sampling.groups(options.num_fid_samples, options.per_proc_batch_size)
    groups = [rows for rows in groups if not missing.isdisjoint(rows)]
    state.wait_for_everyone()  # all have read what is missing before anyone changes it
    state.print(f"{len(missing)} images to make in {store.folder}")

    # 3. All processes draw a group each, again and again; where one fails, all stop.
    mine = groups[state.process_index :: state.num_processes]
    turns = -(-len(groups) // state.num_processes)
    with tqdm(desc="sampling", unit="image", total=len(missing), disable=not state.is_main_process) as progress:
        for turn in range(turns):
            with stopping.together(device):
                if turn < len(mine):
                    rows = [row for row in mine[turn] if row in missing]
                    images = draw(source, mine[turn])
                    store.save(rows, images[[row - mine[turn].start for row in rows]])
            shared = groups[turn * state.num_processes : (turn + 1) * state.num_processes]
            progress.update(sum(row in missing for rows in shared for row in rows))
    with stopping.together(device):
        store.flush()

    # 4. One process gives the whole its name.
    if state.is_main_process:
        store.publish(source.table)
    state.print(f"{options.num_fid_samples} images: {store.target}")


if __name__ == "__main__":
    with exit_codes():
        main()
