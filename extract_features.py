"""Encode a labelled image set once, so that train.py need not do it in every step.

    torchrun --nnodes=1 --nproc_per_node=1 extract_features.py --model DiT-XL/2 \\
        --data-path /path/to/imagenet/train --features-path /path/to/store/features
    python extract_features.py --vae nano --image-size 128 --data-path dataset/chest-xray/train

--data-path is a folder of class folders or a set that prepare.py has made. What comes out is the same, byte for byte,
for any number of processes; on a CPU each of them uses one core. After an interruption the same command goes on.
"""

from medart_core.errors import UserError, exit_codes  # isort: skip (first, for a Ctrl-C while the rest loads)
import argparse
import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from tqdm import tqdm

from medart_core import feature_store, labelled_images, latents, pretrained, stopping
from medart_core.dit_data import DEFAULT_FEATURES
from medart_core.options import Parser


def parse_options() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    what = parser.add_argument_group("what is encoded")
    what.add_argument("--data-path", type=Path, required=True, metavar="DIR", help="labelled images (required)")
    place = {"type": Path, "default": DEFAULT_FEATURES, "metavar": "DIR"}
    what.add_argument("--features-path", "--feature-path", **place, help="new folder (default: features)")
    what.add_argument("--image-size", type=int, default=256, metavar="PIXELS", help="their side (default: 256)")
    what.add_argument(
        "--vae", default="ema", metavar="NAME", help="ema or mse (of the hub), nano (bundled), a folder (default: ema)"
    )
    speed = parser.add_argument_group("speed; changes no byte")
    speed.add_argument("--batch-size", type=int, default=8, metavar="N", help="images read ahead (default: 8)")
    speed.add_argument("--num-workers", type=int, default=4, metavar="N", help="processes that read (default: 4)")
    unused = parser.add_argument_group("understood for old commands; features do not depend on them")
    for flag in ("--model", "--results-dir", "--num-classes", "--epochs", "--global-batch-size", "--global-seed",
                 "--log-every", "--ckpt-every"):  # fmt: skip
        unused.add_argument(flag, metavar="X", help="of train.py")
    options = parser.parse_args()
    if options.image_size < 8 or options.image_size % 8:
        raise UserError(f"--image-size is {options.image_size}; give a multiple of 8 such as 256")
    for name, least in (("batch_size", 1), ("num_workers", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}; give at least {least}")
    return options


@torch.no_grad()
def encode(vae, pixel_values: torch.Tensor) -> torch.Tensor:
    """Moments of images and of their mirror images: (B, 3, S, S) -> (B, 2, 2, C, h, w)."""
    sides = (pixel_values, pixel_values.flip(-1))
    return torch.stack([latents.encode_moments(vae, images) for images in sides], dim=1)


def main() -> None:
    options = parse_options()
    stopping.end_with_launcher()
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=2))
    rank, num_processes, folder = state.process_index, state.num_processes, options.features_path
    device = torch.device(state.device or "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.set_num_threads(1)  # another number changes the last bits

    todo = True
    with stopping.first_process_first(device):
        images = labelled_images.find(options.data_path)
        vae = pretrained.load_vae(options.vae, torch.float32, device)
        side = options.image_size // pretrained.vae_scale_factor(vae)
        shape = (len(images), 2, 2, vae.config.latent_channels, side, side)
        facts = {"image_size": options.image_size, "scaling_factor": vae.config.scaling_factor}
        facts["vae"] = pretrained.vae_name(options.vae)
        if state.is_main_process:
            todo = feature_store.begin(folder, images, facts, shape)
        todo = todo and not (folder / feature_store.MANIFEST).exists()
    size = torch.tensor(shape).prod().item() * 2 / 1e9
    state.print(f"{len(images)} images in {len(images.class_names)} classes -> {size:.2f} GB in {folder}")
    if not todo:
        return state.print("they are there already")

    # 1. Groups of images that are not done yet, cut by number and shared out.
    extraction = feature_store.Extraction(folder)
    pending = extraction.pending()
    state.wait_for_everyone()  # all have read what is pending before anyone changes it
    groups = labelled_images.ImageGroups(images, options.image_size, feature_store.GROUP)
    loader = DataLoader(
        groups,
        batch_size=None,
        sampler=pending[rank::num_processes],
        num_workers=min(options.num_workers, os.cpu_count() or 1),
        prefetch_factor=None if options.num_workers == 0 else -(-options.batch_size // feature_store.GROUP) + 1,
        worker_init_fn=stopping.leave_process_group,
    )

    # 2. Each group goes through the encoder by itself, so that its bytes depend on nothing else.
    done = min((len(groups) - len(pending)) * feature_store.GROUP, len(images))
    with tqdm(desc="encoding", unit="image", total=len(images), initial=done, disable=rank > 0) as progress:
        for group, pixel_values in loader:
            extraction.write(group, encode(vae, pixel_values.to(device)))
            progress.update(min(feature_store.GROUP * num_processes, len(images) - progress.n))
    extraction.flush()

    # 3. One process gives the whole its name.
    stopping.wait_for_all(device)
    if state.is_main_process:
        extraction.publish()
    state.print(f"features of {len(images)} images in {folder}; train on them: train.py --features-path {folder}")


if __name__ == "__main__":
    with exit_codes():
        main()
