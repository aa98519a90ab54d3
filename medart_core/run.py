"""The state of a training run: what changes from step to step, and how it is kept and taken up again."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers.optimization import get_scheduler

from medart_core import checkpoint, lora, lora_layers, trees
from medart_core.data import Example
from medart_core.errors import UserError
from medart_core.pretrained import PixArt

SHOWN_IMAGES = 4  # in one line of an error

Part = tuple[str, torch.Tensor, list[Example]]  # of a step's loss: its name, its value, the images it was computed on


@dataclass
class Run:
    """A model with trainable adapters, its optimiser, the number of finished steps, and the folder of it all."""

    model: PixArt
    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    folder: Path
    step: int = 0
    lr: float = 0.0  # of the last step; the transformer's, where T5 has its own

    @classmethod
    def start(
        cls,
        model: PixArt,
        folder: Path,
        max_steps: int,
        *,
        learning_rate: float,
        text_encoder_lr: float | None,
        scale: float,
        lr_scheduler: str,
        lr_warmup_steps: int,
        lr_num_cycles: int,
        lr_power: float,
        use_8bit_adam: bool,
        **adam: float,
    ) -> "Run":
        """A run at step 0: AdamW on the adapters of both parts, bitsandbytes' with 8-bit moments or torch's fused one.

        `scale` multiplies both learning rates; `adam` holds adam_beta1, adam_beta2, adam_epsilon, adam_weight_decay.
        """
        rates = learning_rate, learning_rate if text_encoder_lr is None else text_encoder_lr
        adapters = [[*lora_layers.trainable_parameters(part)] for part in (model.transformer, model.text_encoder)]
        groups = [{"params": part, "lr": rate * scale} for part, rate in zip(adapters, rates, strict=True) if part]
        settings: dict[str, Any] = {
            "betas": (adam["adam_beta1"], adam["adam_beta2"]),
            "eps": adam["adam_epsilon"],
            "weight_decay": adam["adam_weight_decay"],
        }
        if use_8bit_adam:
            from bitsandbytes.optim import AdamW8bit

            optimizer: torch.optim.Optimizer = AdamW8bit(groups, **settings)
        else:
            optimizer = torch.optim.AdamW(groups, fused=True, **settings)
        lengths = lr_warmup_steps, max_steps, lr_num_cycles, lr_power
        schedule = get_scheduler(lr_scheduler, optimizer, None, *lengths)
        return cls(model, [parameter for part in adapters for parameter in part], optimizer, schedule, folder)

    def average_gradients(self, parts: Sequence[Part], stop: bool, rank: int) -> bool:
        """`lora_layers.average_gradients`; returns whether any process wants to stop.

        Where a loss or gradient of any process is not finite, all of them end before the update: the first one at
        fault raises a UserError that names the step, the loss and its images, the others exit with the same code.
        """
        stopping, faults = lora_layers.average_gradients(self.parameters, [loss for _, loss, _ in parts], stop)
        if any(faults):
            if any(faults[:rank]) or not faults[rank]:
                raise SystemExit(2)
            self._refuse(faults[rank], parts, rank)
        return stopping

    def _refuse(self, fault: int, parts: Sequence[Part], rank: int) -> NoReturn:
        if fault > 0:
            name, _, images = parts[fault - 1]
        else:
            name, images = "gradient", [image for _, _, images in parts for image in images]
        shown = [f"{image.place} ({textwrap.shorten(image.caption, 60)!r})" for image in dict.fromkeys(images)]
        if len(shown) > SHOWN_IMAGES:
            shown[SHOWN_IMAGES:] = [f"{len(shown) - SHOWN_IMAGES} more"]
        saved = checkpoint.checkpoints(self.folder)
        kept = f"{saved[-1][1]} is intact" if saved else "there is no checkpoint yet"
        raise UserError(
            f"step {self.step}, process {rank}: the {name} is not finite, from {', '.join(shown)}; "
            f"nothing was updated, {kept}: look at these images, or train anew with a lower --learning_rate"
        )

    def update(self) -> None:
        """One optimiser step on the gradients that are there."""
        self.lr = float(self.lr_scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1

    def save(self, limit: int | None) -> None:
        """Publish checkpoint-<step>; only then drop the oldest ones beyond `limit`."""
        state = {
            "step": self.step,
            "transformer": lora_layers.adapter_state(self.model.transformer),
            "text_encoder": lora_layers.adapter_state(self.model.text_encoder),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
        }

        def write(folder: Path) -> None:
            trees.save_tree(folder / "state", state)
            self.save_folders(folder)

        published = checkpoint.publish(self.folder, f"checkpoint-{self.step}", write)
        checkpoint.prune(self.folder, limit, published)

    def resume(self, folder: Path, max_steps: int) -> None:
        """Go on from a published checkpoint. Raises UserError if it is beyond the end of this run."""
        state = trees.load_tree(folder / "state")
        if state["step"] > max_steps:
            raise UserError(
                f"{folder} is after {state['step']} steps, this run ends after {max_steps}; raise --max_train_steps"
            )
        lora_layers.load_adapter_state(self.model.transformer, state["transformer"])
        lora_layers.load_adapter_state(self.model.text_encoder, state["text_encoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        self.step = state["step"]

    def save_folders(self, folder: Path) -> None:
        """Write the PEFT folders that sample.py loads."""
        lora_layers.save(self.model.transformer, folder / lora_layers.TRANSFORMER_FOLDER)
        lora_layers.save(self.model.text_encoder, folder / lora_layers.TEXT_ENCODER_FOLDER)

    def save_adapters(self, folder: Path) -> None:
        """Write the PEFT folders, and the same as one file that other tools load."""
        self.save_folders(folder)
        lora.export(folder, folder / lora.FILE_NAME)
