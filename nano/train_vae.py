"""Train the bundled VAE on photographs, stained tissue and the chest X-ray train split.

    python nano/train_vae.py

Writes nano/pixart/vae/ and nano/records/vae.json. Run it again after an interruption: it goes on from the last save
(the optimiser's moments start anew).
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from photographs import FLOWER_HOLD_OUT, chest_x_rays, cifar10, flowers, photographs, stained_tissue
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from medart_core.errors import exit_codes
from medart_core.options import Parser

HERE = Path(__file__).resolve().parent
STATE = HERE.parent / "dataset" / ".nano" / "vae.safetensors"
KL_WEIGHT = 0.01  # per pixel value: just enough to keep the latents near unit variance


def build_vae() -> Any:
    """The stock `AutoencoderKL`: 8x downsampling, 4 latent channels, 1.5 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 4,  # pyright: ignore[reportArgumentType]
        block_out_channels=(16, 32, 64, 96),  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
    )


def to_tensor(images):
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def load_sources():
    """Name -> (images, share of the batch, random crops?), and the held-out sets."""
    flower = flowers()
    held_out = np.arange(len(flower)) % FLOWER_HOLD_OUT == 0
    train = {
        "x-ray": (chest_x_rays("train")[0], 0.4, False),
        "flower": (flower[~held_out], 0.35, True),
        "photograph": (np.concatenate([photographs(), stained_tissue()]), 0.15, True),
        "cifar": (cifar10("train")[0], 0.1, False),
    }
    return train, {"x-ray": chest_x_rays("val")[0], "flower": flower[held_out]}


def draw(rng, images, crop):
    """One image, mirrored half of the time, cropped to 50..100 % of its side when `crop`, at 128 px."""
    image = Image.fromarray(images[rng.integers(len(images))])
    box = None
    if crop:
        side = int(image.width * rng.uniform(0.5, 1.0))
        x, y = rng.integers(image.width - side + 1), rng.integers(image.height - side + 1)
        box = (x, y, x + side, y + side)
    image = np.asarray(image.resize((128, 128), Image.Resampling.BICUBIC, box=box))
    return image[:, ::-1] if rng.random() < 0.5 else image


@torch.no_grad()
def psnr(vae: Any, images: np.ndarray) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB of decode(encode(x).mode())."""
    values = []
    for chunk in to_tensor(images).split(16):
        decoded = vae.decode(vae.encode(chunk).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(10 * torch.log10(4 / (decoded - chunk).square().mean(dim=(1, 2, 3))))
    return torch.cat(values).mean().item()


def load_state(vae: Any, ema: Any) -> tuple[int, float]:
    """Take up an interrupted training; returns its finished steps and seconds."""
    if not STATE.exists():
        ema.load_state_dict(vae.state_dict())
        return 0, 0.0
    tensors = load_file(STATE)
    for name, model in (("vae.", vae), ("ema.", ema)):
        model.load_state_dict({k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)})
    with safe_open(STATE, "pt") as file:
        return int(file.metadata()["step"]), float(file.metadata()["seconds"])


def save_state(vae: Any, ema: Any, step: int, seconds: float) -> None:
    """Keep what `load_state` needs."""
    STATE.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"vae.{k}": v for k, v in vae.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    save_file(tensors, STATE, metadata={"step": str(step), "seconds": str(seconds)})


def reconstruction_loss(vae: Any, pixel_values: torch.Tensor, encoder_learns: bool) -> torch.Tensor:
    """Mean over images of the root of the squared error, and a slight pull of the latents to unit variance.

    The root makes the smooth X-rays count for more than under plain MSE, yet they don't drown the photographs.
    """
    with torch.autocast("cpu", torch.bfloat16):
        with torch.set_grad_enabled(encoder_learns):
            posterior = vae.encode(pixel_values).latent_dist
        decoded = vae.decode(posterior.sample()).sample
    error = (decoded.float() - pixel_values).square().mean(dim=(1, 2, 3)).add(1e-6).sqrt()
    return error.mean() + KL_WEIGHT * posterior.kl().mean() / pixel_values[0].numel()


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3600, help="steps of encoder and decoder (default 3600)")
    parser.add_argument("--decoder-steps", type=int, default=1000, help="further steps of the decoder (default 1000)")
    parser.add_argument("--batch-size", type=int, default=8, help="images per step (default 8)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak rate of each phase (default 2e-3, cosine to 0)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random (default 0)")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    train, held_out = load_sources()
    shares = np.array([share for _, share, _ in train.values()])

    vae, ema = build_vae(), build_vae()
    first_step, seconds_before = load_state(vae, ema)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    start, total = time.perf_counter(), options.steps + options.decoder_steps
    progress = tqdm(range(first_step, total), "VAE", total, initial=first_step, mininterval=10)
    for step in progress:
        if step == options.steps:  # the latents are settled; the decoder goes on from the averaged weights
            vae.load_state_dict(ema.state_dict())
        encoder_learns = step < options.steps
        done, length = (step, options.steps) if encoder_learns else (step - options.steps, options.decoder_steps)
        rng = np.random.default_rng([options.seed, step])
        chosen = [list(train.values())[i] for i in rng.choice(len(shares), size=options.batch_size, p=shares)]
        pixel_values = to_tensor(np.stack([draw(rng, images, crop) for images, _, crop in chosen]))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1, (done + 1) / 200) * 0.5 * (1 + math.cos(math.pi * done / length))
        loss = reconstruction_loss(vae, pixel_values, encoder_learns)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        decay = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(vae.parameters()), 1 - decay)
        if (step + 1) % 250 == 0 or step + 1 in (options.steps, total):
            quality = {name: round(psnr(ema, images[:64]), 2) for name, images in held_out.items()}
            seconds = seconds_before + time.perf_counter() - start
            tqdm.write(f"step {step + 1}  {seconds / 60:.1f} min  loss {loss.item():.3f}  held-out PSNR {quality}")
            save_state(vae, ema, step + 1, seconds)

    publish(ema, train, held_out, options)


@torch.no_grad()
def publish(vae: Any, train: dict, held_out: dict, options: argparse.Namespace) -> None:
    """Set the scaling factor (1 / standard deviation of the latents), save in bf16, record the measured quality."""
    sample = np.concatenate([train[name][0][::20] for name in ("x-ray", "flower")])
    latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in to_tensor(sample).split(16)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.to(torch.bfloat16).save_pretrained(HERE / "pixart" / "vae")
    vae = AutoencoderKL.from_pretrained(HERE / "pixart" / "vae", dtype=torch.float32)
    with safe_open(STATE, "pt") as file:
        minutes = float(file.metadata()["seconds"]) / 60
    record = {
        "held_out_psnr_db": {name: round(psnr(vae, images), 2) for name, images in held_out.items()},
        "held_out_images": {name: len(images) for name, images in held_out.items()},
        "parameters": sum(p.numel() for p in vae.parameters()),
        "scaling_factor": vae.config["scaling_factor"],
        "steps": options.steps,
        "decoder_steps": options.decoder_steps,
        "batch_size": options.batch_size,
        "minutes": round(minutes, 1),
    }
    (HERE / "records").mkdir(exist_ok=True)
    (HERE / "records" / "vae.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    with exit_codes():
        main()
