"""The options of train.py: everything it can be told, with defaults, groups and checks."""

import typing
from dataclasses import dataclass
from pathlib import Path

from medart_core.errors import UserError
from medart_core.gaussian_diffusion import NUM_TIMESTEPS
from medart_core.medart_options import TRACKERS
from medart_core.options import option

ALIASES = {"feature_path": "features_path", "seed": "global_seed"}
CHECKPOINTING = ("none", "full", "selective")


@dataclass
class DiTOptions:
    """Everything that `train.py` can be told; the flags of fast-DiT's commands keep their names and defaults."""

    options: str | None = option(
        None, "model", "a preset of train_options/: original, baseline, tf32_disabled, amp, features"
    )
    model: str = option("DiT-XL/2", "model", "size and patch: DiT-{XL,L,B,S}/{2,4,8}")
    image_size: int | None = option(None, "model", "side of the images in pixels (default: the features', else 256)")
    num_classes: int | None = option(None, "model", "classes (default: the data's, 1000 for features without names)")
    vae: str | None = option(None, "model", "ema, mse, nano or a folder (default: the features', else ema)")
    qk_norm: bool = option(False, "model", "normalise queries and keys: against overflow in long runs in 16 bits")
    ckpt: str | None = option(None, "model", "start from the weights of this .pt instead of random ones")

    features_path: str | None = option(
        None, "data", "what extract_features.py has made, or fast-DiT's folders of .npy (default: features)"
    )
    data_path: str | None = option(None, "data", "labelled images instead, encoded in every step")
    val_path: str | None = option(
        None,
        "data",
        "held-out features or images for the validation loss (default: val/ beside --data-path, if there)",
    )
    max_val_images: int = option(256, "data", "use only that many held-out images")
    no_flip: bool = option(False, "data", "never the mirror image (for images with a left and a right)")
    num_workers: int = option(4, "data", "processes that read images, for --data-path")

    epochs: int = option(1400, "training", "passes over the data, unless --max_steps is given")
    max_steps: int | None = option(None, "training", "optimiser steps in all")
    global_batch_size: int = option(256, "training", "images per optimiser step, over all processes")
    micro_batch_size: int | None = option(
        None, "training", "images of a process at a time (default: all of them, on a GPU as many as will fit)"
    )
    gradient_accumulation_steps: int | None = option(None, "training", "or in how many parts a step is computed")
    learning_rate: float = option(1e-4, "training", "of AdamW")
    weight_decay: float = option(0.0, "training", "of AdamW")
    warmup_steps: int = option(0, "training", "steps in which the learning rate rises to its value")
    max_grad_norm: float | None = option(None, "training", "clip the gradient to this norm (default: not)")
    class_dropout: float = option(0.1, "training", "share of the labels that are replaced by the null class")
    ema_decay: float = option(0.9999, "training", "of the average of the weights")
    no_ema_warmup: bool = option(False, "training", "that decay from the first step on")
    mixed_precision: str | None = option(
        None, "training", "default: what accelerate launch says; auto: bf16 unless that says fp16",
        ("no", "fp16", "bf16", "auto"),
    )  # fmt: skip
    no_tf32: bool = option(False, "training", "fp32 products in full precision")
    gradient_checkpointing: str = option(
        "none", "training", "recompute in the backward pass: nothing, blocks, or all but their products", CHECKPOINTING
    )
    compile: bool = option(False, "training", "compile the blocks: a minute at the start, for long runs on a GPU")
    global_seed: int = option(0, "training", "of everything that is random")

    results_dir: str | None = option(
        None, "output", "where the numbered folders of the runs are (default: results/ of the project)"
    )
    fresh: bool = option(False, "output", "start anew even if an unfinished run of these options is there")
    ckpt_every: int = option(50_000, "output", "steps between checkpoints")
    keep_ckpts: int | None = option(None, "output", "keep only that many of them")
    log_every: int = option(100, "output", "steps between lines of the log")
    sample_every: int = option(10_000, "output", "steps between sample grids and validation losses; 0: none")
    num_samples: int = option(
        4, "output", "images per class in the sample grids, of eight classes at most; 0: no grids"
    )
    num_sampling_steps: int = option(25, "output", "DPM-Solver++ steps of the sample grids")
    cfg_scale: float = option(4.0, "output", "guidance of the sample grids")
    report_to: str = option("tensorboard", "output", "tracker beside log.jsonl; all: both", TRACKERS)

    def check(self) -> None:
        """Find values that cannot work. Raises UserError naming the flag, the value and the remedy."""
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"--{name} is {value}; give a number above 0")
        for name in ("weight_decay", "warmup_steps", "global_seed", "sample_every", "num_samples", "num_workers"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} is {getattr(self, name)}; give 0 or more")
        for name in ("class_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; give 0 or more, and less than 1")
        if not 2 <= self.num_sampling_steps <= NUM_TIMESTEPS:
            raise UserError(f"--num_sampling_steps is {self.num_sampling_steps}; give 2 to {NUM_TIMESTEPS}")
        if self.image_size and self.image_size % 8:
            raise UserError(f"--image_size is {self.image_size}; give a multiple of 8 such as 256")
        if self.data_path and self.features_path:
            raise UserError("--data_path and --features_path exclude each other; give one of them")
        if self.micro_batch_size and self.gradient_accumulation_steps:
            raise UserError("--micro_batch_size and --gradient_accumulation_steps say the same; give one of them")

    def optimizer(self) -> dict[str, typing.Any]:
        """The options of `DiTRun.start`, to be passed on as named arguments."""
        return {name: getattr(self, name) for name in OPTIMIZER}

    def of_the_run(self) -> dict[str, typing.Any]:
        """The options that make a run what it is, as they are kept and compared."""
        settings = {name: value for name, value in vars(self).items() if name not in FREE_ON_RESUME}
        for name in ("features_path", "data_path", "ckpt"):
            if settings[name]:
                settings[name] = str(Path(settings[name]).resolve())
        return settings


POSITIVE = (
    "image_size", "num_classes", "max_val_images", "epochs", "max_steps", "global_batch_size", "micro_batch_size",
    "gradient_accumulation_steps", "learning_rate", "max_grad_norm", "ckpt_every", "keep_ckpts", "log_every",
    "cfg_scale",
)  # fmt: skip

OPTIMIZER = ("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "ema_decay", "no_ema_warmup")

# What may differ between a run and its resumption: none of it touches the course of the training.
FREE_ON_RESUME = frozenset(
    [
        "options", "epochs", "max_steps", "gradient_checkpointing", "compile", "val_path", "max_val_images",
        "num_workers", "results_dir", "fresh", "ckpt_every", "keep_ckpts", "log_every", "sample_every", "num_samples",
        "num_sampling_steps", "cfg_scale", "report_to",
    ]
)  # fmt: skip
