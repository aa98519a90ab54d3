"""Train the bundled PixArt transformer, and its T5 with it, on captioned photographs.

    python nano/train_pixart.py

Needs nano/pixart/vae (train_vae.py) and nano/pixart/{tokenizer,text_encoder} (train_text.py). Writes a complete
PixArtAlphaPipeline folder to nano/pixart, and nano/records/pixart.json. Run it again after an interruption: it goes on
from the last save (the optimisers' moments start anew).
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from captions import photo_caption
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from photographs import CIFAR_CLASSES, FLOWER_HOLD_OUT, cifar10, flowers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoTokenizer, T5EncoderModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from medart_core.errors import exit_codes
from medart_core.options import Parser
from medart_core.text import encode_prompts

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / "dataset" / ".nano"
PHOTO_CLASSES = ("airplane", "automobile", "frog", "horse", "ship", "flower")
CAPTION_DROPOUT = 0.1  # classifier-free guidance needs the empty prompt (arXiv:2207.12598, algorithm 1)
MIN_SNR_GAMMA = 5.0  # arXiv:2303.09556, equation 4
SCHEDULE = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000}


def build_transformer():
    """The stock transformer at 128 px: 64 image tokens of width 224, 6 blocks, 5.4 M parameters, learned sigma."""
    return PixArtTransformer2DModel(
        num_attention_heads=7,
        attention_head_dim=32,
        in_channels=4,
        out_channels=8,
        num_layers=6,
        cross_attention_dim=224,
        sample_size=16,
        patch_size=2,
        caption_channels=192,
        interpolation_scale=1,
    )


def select_photographs(per_class):
    """The first `per_class` training images of five CIFAR classes and all training flowers, at 128 px, uint8."""
    images, labels = cifar10("train")
    flower = flowers()
    flower = flower[np.arange(len(flower)) % FLOWER_HOLD_OUT != 0]
    chosen, names = [], []
    for name in PHOTO_CLASSES[:-1]:
        for index in np.flatnonzero(labels == CIFAR_CLASSES.index(name))[:per_class]:
            image = Image.fromarray(images[index]).resize((128, 128), Image.Resampling.BICUBIC)
            chosen.append(np.asarray(image))
            names.append(name)
    copies = max(1, per_class // len(flower))  # as many flowers as there are photographs of each other class
    return np.concatenate([np.stack(chosen), *[flower] * copies]), names + ["flower"] * (len(flower) * copies)


@torch.no_grad()
def cache_latents(vae, images, file):
    """Scaled latents (2, N, 4, 16, 16) of the images and of their mirror images, kept in `file`."""
    if file.exists():
        latents = load_file(file)["latents"]
        if latents.shape[1] == len(images):
            return latents.float()
    both = []
    for mirrored in (False, True):
        encoded = []
        for chunk in tqdm(range(0, len(images), 32), desc="latents", mininterval=10):
            batch = images[chunk : chunk + 32, :, ::-1] if mirrored else images[chunk : chunk + 32]
            pixels = torch.from_numpy(np.ascontiguousarray(batch)).permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.autocast("cpu", torch.bfloat16):
                encoded.append(vae.encode(pixels).latent_dist.mode().float() * vae.config.scaling_factor)
        both.append(torch.cat(encoded))
    latents = torch.stack(both)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"latents": latents.to(torch.bfloat16).contiguous()}, file)
    return latents


def optimizers(transformer, text_encoder, lr):
    """Muon for the matrices of the blocks, AdamW for the rest; T5 at a tenth of the rate."""
    matrices = [p for n, p in transformer.named_parameters() if n.startswith("transformer_blocks") and p.ndim == 2]
    matrices = [p for p in matrices if min(p.shape) > 16]
    chosen = {id(p) for p in matrices}
    others = [p for p in transformer.parameters() if id(p) not in chosen]
    adamw = torch.optim.AdamW(
        [{"params": others, "factor": 1.0}, {"params": list(text_encoder.parameters()), "factor": 0.1}],
        lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True,
    )  # fmt: skip
    muon = torch.optim.Muon(
        [{"params": matrices, "factor": 2.0}], lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    return muon, adamw


def diffusion_loss(transformer, text_encoder, tokenizer, latents, captions, alphas_cumprod):
    """Min-SNR-weighted noise-prediction error of one batch; equal captions are encoded once."""
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, 1000, (len(latents),))
    alpha_bar = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy_latents = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
    distinct = sorted(set(captions))
    rows = torch.tensor([distinct.index(caption) for caption in captions])
    with torch.autocast("cpu", torch.bfloat16):
        embeds, mask = encode_prompts(tokenizer, text_encoder, distinct)
        prediction = transformer(
            noisy_latents,
            encoder_hidden_states=embeds[rows],
            encoder_attention_mask=mask[rows],
            timestep=timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample.chunk(2, dim=1)[0]
    snr = alpha_bar / (1 - alpha_bar)
    return (snr.clamp(max=MIN_SNR_GAMMA) / snr * (prediction.float() - noise).square()).mean()


def publish(transformer, text_encoder, tokenizer, vae):
    """Write the stock pipeline folder: tensors in bf16, the T5 config in float32 (stock loading would mix dtypes)."""
    scheduler = DPMSolverMultistepScheduler(**SCHEDULE)
    parts = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
    parts = {name: part.to(torch.bfloat16) for name, part in parts.items()}
    pipeline = PixArtAlphaPipeline(tokenizer=tokenizer, scheduler=scheduler, **parts)
    pipeline.save_pretrained(HERE / "pixart")
    config = HERE / "pixart" / "text_encoder" / "config.json"
    values = json.loads(config.read_text())
    values.pop("torch_dtype", None)
    config.write_text(json.dumps(values | {"dtype": "float32"}, indent=2) + "\n")


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1800, help="optimiser steps in all (default 1800)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step (default 64)")
    parser.add_argument("--per-class", type=int, default=600, help="photographs per class (default 600)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default 1e-3, falling to 0)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random (default 0)")
    options = parser.parse_args()
    torch.manual_seed(options.seed)

    vae = AutoencoderKL.from_pretrained(HERE / "pixart" / "vae", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(HERE / "pixart" / "tokenizer")
    text_encoder = T5EncoderModel.from_pretrained(HERE / "pixart" / "text_encoder", dtype=torch.float32)
    images, labels = select_photographs(options.per_class)
    latents = cache_latents(vae, images, WORK / f"latents-{options.per_class}.safetensors")
    transformer = build_transformer()
    models = torch.nn.ModuleDict({"transformer": transformer, "text_encoder": text_encoder})
    ema = {k: v.detach().clone() for k, v in models.named_parameters()}
    state, first_step, seconds_before = WORK / "pixart.safetensors", 0, 0.0
    if state.exists():
        tensors = load_file(state)
        models.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("now.")}, strict=False)
        ema = {name: tensors[f"ema.{name}"] for name in ema}  # in the models' order
        with safe_open(state, "pt") as file:
            first_step, seconds_before = int(file.metadata()["step"]), float(file.metadata()["seconds"])
    muon, adamw = optimizers(transformer, text_encoder, options.lr)
    alphas_cumprod = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))).float()

    start, running = time.perf_counter(), None
    progress = tqdm(range(first_step, options.steps), initial=first_step, total=options.steps, mininterval=10)
    for step in progress:
        rng = np.random.default_rng([options.seed, step])
        torch.manual_seed(1_000_003 * options.seed + step)
        rows, sides = rng.integers(len(labels), size=options.batch_size), rng.integers(2, size=options.batch_size)
        captions = ["" if rng.random() < CAPTION_DROPOUT else photo_caption(labels[row], rng) for row in rows]
        fall = min(1, (step + 1) / 100) * min(1, 1.6 * (1 - step / options.steps))  # flat, then linearly to zero
        for group in (*muon.param_groups, *adamw.param_groups):
            group["lr"] = options.lr * group["factor"] * fall
        loss = diffusion_loss(transformer, text_encoder, tokenizer, latents[sides, rows], captions, alphas_cumprod)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
        decay = min(0.998, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in models.parameters()], 1 - decay)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        progress.set_postfix(loss=f"{running:.4f}", refresh=False)
        if (step + 1) % 500 == 0 or step + 1 == options.steps:
            seconds = seconds_before + time.perf_counter() - start
            tensors = {f"now.{k}": v.detach() for k, v in models.named_parameters()}
            tensors |= {f"ema.{k}": v for k, v in ema.items()}
            save_file(tensors, state, metadata={"step": str(step + 1), "seconds": str(seconds)})
            tqdm.write(f"step {step + 1}  {seconds / 60:.1f} min  loss {running:.4f}")

    models.load_state_dict(ema, strict=False)
    publish(transformer, text_encoder, tokenizer, vae)
    with safe_open(state, "pt") as file:
        minutes = round(float(file.metadata()["seconds"]) / 60, 1)
    record = {
        "parameters": sum(p.numel() for p in transformer.parameters()),
        "photographs_per_class": options.per_class,
        "classes": PHOTO_CLASSES,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "minutes": minutes,
    }
    (HERE / "records" / "pixart.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    with exit_codes():
        main()
