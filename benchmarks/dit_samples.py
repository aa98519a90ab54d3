"""Cases for `interleave`: sampling from DiT, and the .npz of the samples, each beside the plain way.

The plain way is that of the published scripts, written anew: fp32, tables copied to the device in each step, noise for
both halves of the guided batch; every image as a PNG file that is read again, all of them stacked, `np.savez`.
https://github.com/facebookresearch/DiT/blob/ed81ce2/sample_ddp.py
"""

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from medart_core import dit_sampling, seeds
from medart_core.gaussian_diffusion import spaced_timesteps
from medart_core.many_samples import SampleStore
from models import DiT, DiT_models

CFG_SCALE = 1.5
IMAGES_AT_A_TIME = 32


def make_model(name: str = "DiT-S/2", input_size: int = 32) -> DiT:
    """A DiT with random weights that predicts something."""
    torch.manual_seed(0)
    model = DiT_models[name](input_size=input_size, num_classes=1000).eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model


def sampler_cases(model: DiT, images: int, num_steps: int, compiled: bool = True) -> dict[str, Callable[[], Tensor]]:
    """Latents of `images` images by `num_steps` ancestral steps with guidance; the first two are of equal precision.

    The cases of one precision take the same noise, and their results can be compared.
    """
    labels = torch.arange(images)
    half = copy.deepcopy(model).bfloat16()

    def ours(network: DiT) -> Tensor:
        noises = [seeds.generator(0, number) for number in range(images)]
        return dit_sampling.sample_latents(network, labels, noises, num_steps=num_steps, cfg_scale=CFG_SCALE)

    cases = {
        "baseline": partial(plain_sampler, model, labels, num_steps),
        "ours": partial(ours, model),
        "ours, bf16": partial(ours, half),
    }
    if compiled:
        fast = copy.deepcopy(half)
        fast.compile_blocks()
        cases["ours, bf16, compiled"] = partial(ours, fast)
    return cases


@torch.no_grad()
def plain_sampler(model: DiT, labels: Tensor, num_steps: int) -> Tensor:
    """Ancestral sampling as published; the noise of the first half is that of our own cases."""
    steps = spaced_timesteps(num_steps)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[steps]
    before = np.append(1.0, alpha_bar[:-1])
    betas = 1 - alpha_bar / before
    variances = betas * (1 - before) / (1 - alpha_bar)
    tables = {
        "eps": np.sqrt(1 / alpha_bar - 1),
        "x": np.sqrt(1 / alpha_bar),
        "start": betas * np.sqrt(before) / (1 - alpha_bar),
        "same": (1 - before) * np.sqrt(1 - betas) / (1 - alpha_bar),
        "max": np.log(betas),
        "min": np.log(np.append(variances[1], variances[1:])),
    }
    noises = [seeds.generator(0, number) for number in range(len(labels))]
    shape = (1, 4, model.input_size, model.input_size)

    def draw() -> Tensor:
        own = torch.cat([torch.randn(shape, generator=noise) for noise in noises])
        return torch.cat([own, torch.randn(own.shape)])

    x = draw()
    x[len(labels) :] = x[: len(labels)]
    y = torch.cat([labels, torch.full_like(labels, model.num_classes)])
    for n in reversed(range(num_steps)):
        row = {
            name: torch.from_numpy(table).to(x.device)[torch.full((len(x),), n)].float()[:, None, None, None]
            + torch.zeros(x.shape)
            for name, table in tables.items()
        }
        t = torch.tensor(steps)[torch.full((len(x),), n)]
        eps, values = model.forward_with_cfg(x, t, y, CFG_SCALE).chunk(2, dim=1)
        mean = row["start"] * (row["x"] * x - row["eps"] * eps) + row["same"] * x
        share = (values + 1) / 2
        log_variance = share * row["max"] + (1 - share) * row["min"]
        x = mean + (torch.exp(0.5 * log_variance) * draw() if n else 0)
    return x[: len(labels)]


def npz_cases(folder: Path, images: Tensor) -> dict[str, Callable[[], object]]:
    """Keep (N, H, W, 3) uint8 images: the plain way, ours with the .npz alone, and ours with PNG files, too."""
    return {
        "baseline": partial(plain_npz, folder / "plain", images),
        "ours": partial(our_npz, folder / "ours", images, png=False),
        "ours, with PNG files": partial(our_npz, folder / "png", images, png=True),
    }


def plain_npz(folder: Path, images: Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image.numpy()).save(folder / f"{number:06d}.png")
    read = [np.asarray(Image.open(folder / f"{number:06d}.png")).astype(np.uint8) for number in range(len(images))]
    np.savez(folder.with_suffix(".npz"), arr_0=np.stack(read))
    return folder.with_suffix(".npz")


def our_npz(folder: Path, images: Tensor, png: bool) -> Path:
    count, height, width, _ = images.shape
    folder.mkdir(parents=True, exist_ok=True)
    store = SampleStore(Path(tempfile.mkdtemp(dir=folder)), "samples", (count, height, width, 3), png)
    store.begin({})
    for start in range(0, count, IMAGES_AT_A_TIME):
        rows = range(start, min(start + IMAGES_AT_A_TIME, count))
        store.save([*rows], images[rows.start : rows.stop])
    store.flush()
    store.publish([{}] * count)
    return store.target
