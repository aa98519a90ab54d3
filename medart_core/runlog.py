"""What a run writes for people while it goes: log.jsonl, trackers, sample grids, and the model card at its end."""

from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from medart_core import model_card
from medart_core.entries import Entries, peak_mem_gb
from medart_core.medart_options import MedArtOptions, image_sides
from medart_core.pictures import image_grid
from medart_core.pretrained import PixArt
from medart_core.sampling import sample_images


class RunLog(Entries):
    """Means of every `logging_steps` steps and each HLDF step, as JSON lines and in the trackers; sample grids."""

    def __init__(self, folder: Path, opts: MedArtOptions, prompts: list[str], first_step: int):
        """Entries from `first_step` on are dropped: a resumed run writes them again."""
        super().__init__(folder, opts.report_to, first_step)
        self.opts, self.prompts = opts, prompts
        self.pending: list[tuple[Mapping[str, Tensor], float]] = []

    def add(self, step: int, values: Mapping[str, Tensor], seconds: float, lr: float, progress: tqdm) -> None:
        """Take in the 0-dim tensors of one step; they are read, and the device waited for, only when written."""
        with_hldf = "loss_color" in values
        self.pending.append((values, seconds))
        if not with_hldf and (step + 1) % self.opts.logging_steps:
            return
        kind = "sec_per_hldf_step" if with_hldf else "sec_per_step"
        mean_loss = torch.stack([values["loss_noise"] for values, _ in self.pending]).mean().item()
        entry = {name: float(value) for name, value in values.items()} | {"loss_noise": mean_loss, "lr": lr}
        plain = [seconds for values, seconds in self.pending if "loss_color" not in values]
        entry[kind] = seconds if with_hldf else sum(plain) / len(plain)
        entry["peak_mem_gb"] = peak_mem_gb()
        self.pending.clear()
        self.write(step, entry)
        shown = {name: f"{entry[name]:.4f}" for name in ("loss_noise", "loss_color") if name in entry}
        progress.set_postfix(shown, refresh=False)

    def validation(self, finished_steps: int, loss: float) -> None:
        """Take in the loss on held-out images after `finished_steps` steps."""
        self.write(max(finished_steps - 1, 0), {"loss_validation": loss})

    def grid(self, model: PixArt, step: int) -> None:
        """Write samples/step-<step>.png: a row per prompt, from the same noise at every step."""
        if not self.opts.num_validation_images:
            return
        count, size = self.opts.num_validation_images, image_sides(self.opts.resolution or model.image_size)
        seeds = [self.opts.seed + column for column in range(count)] * len(self.prompts)
        repeated = [prompt for prompt in self.prompts for _ in range(count)]
        images = sample_images(
            model,
            repeated,
            seeds,
            image_size=size,
            batch_size=min(4, len(seeds)),
            max_token_length=self.opts.max_token_length,
        )
        pictures = [Image.fromarray(image.numpy()) for image in images]
        rows = [pictures[row * count : (row + 1) * count] for row in range(len(self.prompts))]
        self.picture(step, image_grid(rows, row_names=self.prompts, cell=min(pictures[0].width, 256)))

    def model_card(self, base: str, settings: Mapping, step: int) -> None:
        """Write README.md: what was trained on what, with which options, and how to use it."""
        title = f"PixArt-alpha LoRA, {step} steps{'' if self.opts.no_hldf else ' with HLDF'}"
        usage = [f'python sample.py --lora "{self.folder}" --prompt "{self.prompts[0]}"']
        grid = f"samples/step-{step:06d}.png" if self.opts.num_validation_images else None
        card = model_card.text(title, {**settings, "base": base}, step, usage, grid=grid)
        (self.folder / "README.md").write_text(card, encoding="utf-8")
