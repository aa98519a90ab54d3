"""The plain way to train DiT and to sample from it: what fast-DiT's recipe does, written anew.

Every block is recomputed, weights and optimiser are fp32, a Python loop averages the weights parameter by parameter,
each loss is read with `.item()`, each image is a .npy file with another one for its class; samples are drawn in fp32
with noise for both halves of the guided batch, saved as PNG files and read again for the .npz.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from medart_core.gaussian_diffusion import NUM_TIMESTEPS, GaussianDiffusion, cumulative_alphas, spaced_timesteps
from medart_core.objectives import diffusion_loss

EMA_DECAY = 0.9999


class Trainer:
    """A model with full checkpointing, AdamW that goes from parameter to parameter, and an average of the weights."""

    def __init__(self, model: Any, autocast: AbstractContextManager | None = None):
        self.model, self.ema, self.autocast = model, deepcopy(model).requires_grad_(False), autocast or nullcontext()
        model.set_checkpointing("full")
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0, foreach=False, fused=False)
        self.diffusion = GaussianDiffusion()

    def step(self, x_start: Tensor, t: Tensor, y: Tensor, noise: Tensor, drop: Tensor) -> float:
        """One update; returns the loss."""
        with self.autocast:
            loss = diffusion_loss(self.model, self.diffusion, x_start, t, y, noise, drop).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.update()
        return loss.item()

    @torch.no_grad()
    def update(self) -> None:
        """The optimiser's step and the average's."""
        self.optimizer.step()
        averages = dict(self.ema.named_parameters())
        for name, parameter in self.model.named_parameters():
            averages[name].mul_(EMA_DECAY).add_(parameter.data, alpha=1 - EMA_DECAY)


class FileDataset(Dataset):
    """A latent and a class from two files."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.names = sorted(path.name for path in (folder / "features").iterdir())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        features = np.load(self.folder / "features" / self.names[index])
        labels = np.load(self.folder / "labels" / self.names[index])
        return torch.from_numpy(features), torch.from_numpy(labels)


def write_files(folder: Path, count: int, side: int) -> None:
    """Random latents (1, 4, side, side) in fp32, and classes, a file each."""
    for part in ("features", "labels"):
        (folder / part).mkdir(parents=True)
    draws = np.random.default_rng(0)
    for number in range(count):
        np.save(folder / "features" / f"{number}.npy", draws.standard_normal((1, 4, side, side), dtype=np.float32))
        np.save(folder / "labels" / f"{number}.npy", draws.integers(1000, size=1))


def loader(folder: Path, batch_size: int) -> DataLoader:
    """Shuffled batches of the files."""
    return DataLoader(FileDataset(folder), batch_size, shuffle=True, drop_last=True, num_workers=0)


@torch.no_grad()
def sample(model: nn.Module, labels: Tensor, noises: Sequence[Tensor], cfg_scale: float) -> Tensor:
    """Ancestral sampling with learned variances in as many steps as there are noises after the first one.

    `noises` are (B, C, h, w): the start, then one for each step.
    """
    steps = spaced_timesteps(len(noises) - 1)
    alpha_bar = cumulative_alphas()[steps]
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    y = torch.cat([labels, torch.full_like(labels, model.num_classes)])  # pyright: ignore
    x = torch.cat([noises[0], noises[0]])
    for place in reversed(range(len(steps))):
        out = model.forward_with_cfg(x, torch.full((len(x),), steps[place]), y, cfg_scale)  # pyright: ignore
        eps, values = out.chunk(2, dim=1)
        a, b = alpha_bar[place], before[place]
        beta = 1 - a / b
        x_start = (x - (1 - a).sqrt() * eps) / a.sqrt()
        mean = (b.sqrt() * beta / (1 - a) * x_start + (a / b).sqrt() * (1 - b) / (1 - a) * x).float()
        share = (values + 1) / 2
        least = (beta * (1 - b) / (1 - a)).clamp(min=1e-20)
        log_variance = share * beta.log() + (1 - share) * least.log()
        noise = noises[len(steps) - place]
        x = mean if place == 0 else mean + (0.5 * log_variance).exp().float() * torch.cat([noise, noise])
    assert steps[-1] == NUM_TIMESTEPS - 1
    return x[: len(labels)]


def save_npz(folder: Path, images: Sequence[np.ndarray]) -> Path:
    """A PNG file per image, all of them read again, stacked and saved."""
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:06d}.png")
    read = [np.asarray(Image.open(folder / f"{number:06d}.png")).astype(np.uint8) for number in range(len(images))]
    np.savez(folder / "samples.npz", arr_0=np.stack(read))
    return folder / "samples.npz"
