"""What train.py writes for people: the lines that fast-DiT's users know, log.jsonl, held-out losses, sample grids."""

import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from medart_core import pretrained
from medart_core.dit_data import Source
from medart_core.dit_sampling import choose_labels, sample_images
from medart_core.entries import Entries, peak_mem_gb
from medart_core.errors import UserError
from medart_core.gaussian_diffusion import NUM_TIMESTEPS, GaussianDiffusion
from medart_core.objectives import diffusion_loss
from medart_core.pictures import image_grid
from medart_core.seeds import SharedDraws
from medart_core.throughput import Throughput

VALIDATION, SPREAD = 3, 389  # name of a random stream; a stride that scatters the timesteps over the images
VALIDATION_BATCH, SAMPLING_BATCH = 16, 4


class DiTLog(Entries):
    """Lines in log.txt and log.jsonl, by the number of finished steps; those after `step` are written again."""

    def __init__(self, folder: Path, report_to: str, step: int, throughput: Throughput, images: int, processes: int):
        """`images` per step over all processes."""
        super().__init__(folder, report_to, step + 1)
        self.throughput, self.images, self.processes = throughput, images, processes
        self.seconds, self.steps = 0.0, 0
        self.say(throughput.describe())

    def say(self, line: str) -> None:
        """One line on stdout and, with the time, in log.txt."""
        tqdm.write(line, file=sys.stdout)
        with open(self.folder / "log.txt", "a", encoding="utf-8") as file:
            file.write(f"[{datetime.now():%Y-%m-%d %H:%M:%S}] {line}\n")

    def add(self, seconds: float) -> None:
        """Take in the duration of a step."""
        self.seconds, self.steps = self.seconds + seconds, self.steps + 1

    def line(self, step: int, loss: float, figures: Mapping[str, float]) -> None:
        """Write the mean loss and speed since the last line."""
        steps_per_sec = self.steps / self.seconds
        images_per_sec = steps_per_sec * self.images
        self.seconds, self.steps = 0.0, 0
        self.say(f"(step={step:07d}) Train Loss: {loss:.4f}, Train Steps/Sec: {steps_per_sec:.2f}")
        speed = {"steps_per_sec": steps_per_sec, "images_per_sec": images_per_sec, "peak_mem_gb": peak_mem_gb()}
        self.write(step, {"loss": loss, **figures, **speed, **self.throughput.shares(images_per_sec / self.processes)})

    def validation(self, step: int, loss: float) -> None:
        """Write the loss of the averaged weights on held-out images."""
        self.say(f"(step={step:07d}) Validation Loss: {loss:.4f}")
        self.write(step, {"loss_validation": loss})


@torch.no_grad()
def validation_loss(model: Any, diffusion: GaussianDiffusion, held_out: Source, limit: int) -> float:
    """Mean loss of up to `limit` images, with the same noise and timesteps at every call and in every run."""
    device, total, count = next(model.parameters()).device, 0.0, min(len(held_out), limit)
    chosen = [place * len(held_out) // count for place in range(count)]
    starts = range(0, count, VALIDATION_BATCH)
    keys = [[(0, index) for index in chosen[start : start + VALIDATION_BATCH]] for start in starts]
    mirrors = (torch.zeros(len(part), dtype=torch.bool) for part in keys)
    for start, (values, labels) in zip(starts, held_out.read(keys, mirrors), strict=True):
        draws = SharedDraws((VALIDATION, start), len(labels))
        noises = [draws.normal(*held_out.latent_shape).to(device) for _ in range(2)]
        t = torch.arange(start, start + len(labels), device=device) * SPREAD % NUM_TIMESTEPS
        x = held_out.latents(values.to(device), noises[0])
        total += diffusion_loss(model, diffusion, x, t, labels.to(device), noises[1]).sum().item()
    return total / count


class SampleGrids:
    """Pictures of the averaged weights' samples: a row per class, from the same noise at every step."""

    def __init__(self, source: Source, device: torch.device, seed: int, per_class: int, **sampler: Any):
        self.source, self.device, self.seed, self.per_class, self.sampler = source, device, seed, per_class, sampler
        self.vae: Any = None

    def draw(self, model: Any) -> Image.Image | None:
        """The picture; None, with a word about it, where there is no VAE to decode the latents."""
        if not self.per_class:
            return None
        try:
            self.vae = self.vae or pretrained.load_vae(self.source.vae, torch.float32, self.device)
        except UserError as error:
            print(f"no sample grids: {error}", file=sys.stderr, flush=True)
            self.per_class = 0
            return None
        classes = choose_labels([], self.source.num_classes)
        labels = [label for label in classes for _ in range(self.per_class)]
        numbers = [*range(self.per_class)] * len(classes)
        images = sample_images(
            model,
            self.vae,
            labels,
            numbers,
            seed=self.seed,
            batch_size=SAMPLING_BATCH,
            sampler="dpm++",
            **self.sampler,
        )
        pictures = [Image.fromarray(image.numpy()) for image in images]
        rows = [pictures[start : start + self.per_class] for start in range(0, len(pictures), self.per_class)]
        names = self.source.class_names or [f"class {label}" for label in range(self.source.num_classes)]
        return image_grid(rows, row_names=[names[label] for label in classes], cell=min(pictures[0].width, 256))
