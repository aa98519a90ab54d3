"""The state of a training run: what changes from step to step, and how it is kept and taken up again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medart_core import checkpoint, lora, lora_file
from medart_core.pretrained import PixArt


def adamw(
    groups: list[dict[str, Any]], betas: tuple[float, float], eps: float, weight_decay: float, use_8bit: bool
) -> torch.optim.Optimizer:
    """AdamW of groups `{"params": [...], "lr": x}`: bitsandbytes' with 8-bit moments, or else torch's fused one."""
    groups = [group for group in groups if group["params"]]
    settings = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
    if use_8bit:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **settings)  # pyright: ignore[reportArgumentType]
    return torch.optim.AdamW(groups, fused=True, **settings)


@dataclass
class Run:
    """A model with trainable adapters, its optimiser, the number of finished steps, and the folder of it all."""

    model: PixArt
    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    folder: Path
    step: int = 0

    @property
    def lr(self) -> float:
        """The learning rate of the last step (the transformer's, where T5 has its own)."""
        return float(self.lr_scheduler.get_last_lr()[0])

    def update(self) -> None:
        """One optimiser step on the gradients that are there."""
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1

    def save(self, limit: int | None) -> None:
        """Publish checkpoint-<step>; only then drop the oldest ones beyond `limit`."""
        state = {
            "step": self.step,
            "transformer": lora.adapter_state(self.model.transformer),
            "text_encoder": lora.adapter_state(self.model.text_encoder),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
        }

        def write(folder: Path) -> None:
            checkpoint.save_tree(folder / "state", state)
            self.save_folders(folder)

        published = checkpoint.publish(self.folder, f"checkpoint-{self.step}", write)
        checkpoint.prune(self.folder, limit, published)

    def resume(self, folder: Path) -> None:
        """Go on from a published checkpoint."""
        state = checkpoint.load_tree(folder / "state")
        lora.load_adapter_state(self.model.transformer, state["transformer"])
        lora.load_adapter_state(self.model.text_encoder, state["text_encoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        self.step = state["step"]

    def save_folders(self, folder: Path) -> None:
        """Write the PEFT folders that sample.py loads."""
        lora.save(self.model.transformer, folder / lora.TRANSFORMER_FOLDER)
        lora.save(self.model.text_encoder, folder / lora.TEXT_ENCODER_FOLDER)

    def save_adapters(self, folder: Path) -> None:
        """Write the PEFT folders, and the same as one file that other tools load."""
        self.save_folders(folder)
        lora_file.export(folder, folder / lora_file.FILE_NAME)
