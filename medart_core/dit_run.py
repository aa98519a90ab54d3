"""The state of a DiT training: weights, their average, optimiser and scaler; a step's end, and checkpoints of it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from medart_core import checkpoint, numbered_runs
from medart_core.ema import EMA
from medart_core.errors import UserError

# Bytes of activations per token, channel and block in 16 bits; what an image takes of memory without checkpointing.
ACTIVATIONS, SHARE_OF_MEMORY = 36, 0.8
# Overflows in fp16 one after the other that end a run: from its start at 2**16 the loss's scale has come to 2**-14.
MAX_OVERFLOWS = 30


@dataclass
class DiTRun:
    """A model in training. `network` is what is called: the model, or what averages its gradients over processes."""

    model: nn.Module
    network: nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    folder: Path
    args: dict[str, Any]
    learning_rate: float
    warmup_steps: int
    max_grad_norm: float | None
    step: int = 0
    overflows: int = 0  # up to now, without a good step between them
    window: list[float] = field(default_factory=lambda: [0.0, 0])  # sum and number of the losses since the last line

    @classmethod
    def start(
        cls,
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        folder: Path,
        args: dict[str, Any],
        *,
        learning_rate: float,
        weight_decay: float,
        warmup_steps: int,
        max_grad_norm: float | None,
        ema_decay: float,
        no_ema_warmup: bool,
    ) -> "DiTRun":
        """A run at step 0; the model is on its device already, and equal on all processes."""
        ema = EMA(model, ema_decay, not no_ema_warmup)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        fused = device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(trained, learning_rate, weight_decay=weight_decay, fused=fused)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        network = model
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            devices = [device] if device.type == "cuda" else None
            network = DistributedDataParallel(model, devices, gradient_as_bucket_view=True)
        rates = learning_rate, warmup_steps, max_grad_norm
        return cls(model, network, ema, optimizer, scaler, folder, args, *rates)

    # --- A step ---

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """Forward and backward of a part of a step; only that of the last one averages the gradients."""
        ddp = isinstance(self.network, DistributedDataParallel)
        with self.network.no_sync() if ddp and not last else nullcontext():  # pyright: ignore[reportCallIssue]
            yield

    def finish_step(self, loss: Tensor, stop: bool) -> tuple[dict[str, float], bool]:
        """Clip, update weights and average; returns the step's figures, and whether any process wants to stop.

        `loss` is this process's mean; the one waiting for the device in a step is for the mean of all of them. Where
        that, or in other precisions than fp16 the gradient, is not finite, every process ends before the update. A
        step whose gradient overflows in fp16 is left out, of the average of the weights as well; after `MAX_OVERFLOWS`
        of them in a row every process ends, too.

        Raises:
            UserError: by the first process, if the loss or the gradient is not finite.
        """
        self.scaler.unscale_(self.optimizer)
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained], foreach=True)
        mean, stopping, grad_norm = self._agree(loss, stop, norm)
        fp16 = self.scaler.is_enabled()
        if not math.isfinite(mean) or not (fp16 or math.isfinite(grad_norm)):
            self._refuse(f"step {self.step + 1}: the {'gradient' if math.isfinite(mean) else 'loss'} is not finite")
        self.overflows = 0 if math.isfinite(grad_norm) else self.overflows + 1
        if self.overflows == MAX_OVERFLOWS:
            first = self.step + 2 - MAX_OVERFLOWS
            self._refuse(f"steps {first} to {self.step + 1}: the gradient is too large for fp16 in each of them")
        if self.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(trained, self.max_grad_norm, norm, foreach=True)
        lr = self.learning_rate * min(1.0, (self.step + 1) / max(self.warmup_steps, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if math.isfinite(grad_norm):
            self.ema.update(self.step)
        self.optimizer.zero_grad()
        self.step += 1
        self.window = [self.window[0] + mean, self.window[1] + 1]
        return {"grad_norm": grad_norm, "lr": lr}, stopping

    def _agree(self, loss: Tensor, stop: bool, norm: Tensor) -> tuple[float, bool, float]:
        """Mean loss, whether anyone stops, and the gradient's norm, which all processes have already."""
        words, num_processes = torch.stack([loss.float(), torch.full_like(loss, float(stop)).float()]), 1
        if self.network is not self.model:
            torch.distributed.all_reduce(words)
            num_processes = torch.distributed.get_world_size()
        total, stops, grad_norm = torch.cat([words, norm.float()[None]]).tolist()
        return total / num_processes, stops > 0, grad_norm

    def _refuse(self, fault: str) -> None:
        if self.network is not self.model and torch.distributed.get_rank():
            raise SystemExit(2)
        saved = numbered_runs.steps(self.folder)
        kept = f"{numbered_runs.file_of(self.folder, saved[-1])} is intact" if saved else "there is no checkpoint yet"
        raise UserError(
            f"{fault}; nothing was updated, {kept}: train anew with a lower --learning-rate, with --max-grad-norm 1, "
            "or in 16 bits with --qk-norm, and bf16 rather than fp16"
        )

    def mean_loss(self) -> float:
        """Mean over processes and steps since this was last asked."""
        total, count = self.window
        self.window = [0.0, 0]
        return total / max(count, 1)

    # --- Checkpoints ---

    def save(self, limit: int | None) -> None:
        """Publish checkpoints/<step>.pt and what resuming needs; only then drop the oldest beyond `limit`."""
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "opt": self.optimizer.state_dict(),
            "args": self.args,
        }
        resume = {"step": self.step, "scaler": self.scaler.state_dict(), "window": self.window}
        with checkpoint.disk_faults(self.folder):
            numbered_runs.publish(self.folder, self.step, lambda file: torch.save(state, file), resume)
        numbered_runs.prune(self.folder, limit, self.step)

    def resume(self, step: int) -> None:
        """Go on from a published checkpoint."""
        state = torch.load(numbered_runs.file_of(self.folder, step), map_location="cpu", weights_only=True, mmap=True)
        self.model.load_state_dict(state["model"])
        self.ema.model.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["opt"])
        beside = numbered_runs.read_resume(self.folder, step)
        self.step, self.window = beside["step"], beside["window"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(beside["scaler"])


def micro_batch_size(model: Any, device: torch.device, rows: int, asked: int | None, parts: int | None) -> int:
    """How many of a process's `rows` images go through the network at a time: as `asked`, or in that many `parts`.

    With neither all of them; but on a GPU, without checkpointing, as many as its memory will hold beside the weights,
    in equal parts.
    """
    if asked:
        return min(asked, rows)
    if parts is None and device.type == "cuda" and model.blocks[0].checkpointing == "none":
        weights = sum(p.numel() for p in model.parameters())
        tokens, width = model.pos_embed.shape[1:]
        per_image = ACTIVATIONS * tokens * width * len(model.blocks)
        memory = torch.cuda.get_device_properties(device).total_memory * SHARE_OF_MEMORY - 20 * weights
        parts = math.ceil(rows * per_image / max(memory, per_image))
    return math.ceil(rows / (parts or 1))
