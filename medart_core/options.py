"""The options of medart.py: typed, grouped, checked, and kept as JSON beside the run."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field

from diffusers_grad import GRADIENT_MODES
from medart_core.errors import UserError

SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
TRACKERS = ("tensorboard", "none")


def option(default, group: str, help: str, choices: Sequence[str] | None = None):
    """A dataclass field that becomes a command-line flag."""
    return field(default=default, metadata={"group": group, "help": help, "choices": choices})


@dataclass
class MedArtOptions:
    """Everything that `medart.py` can be told; the flags of the published command keep their names."""

    pretrained_model_name_or_path: str | None = option(
        None, "model", "PixArt-alpha folder or hub id (default: nano/pixart)"
    )
    revision: str | None = option(None, "model", "revision of the model and of a data set on the hub")
    variant: str | None = option(None, "model", "file variant of the model's weights, such as fp16")

    dataset_name: str | None = option(
        None, "data", "folder with images and metadata.csv, or hub id (default: dataset/chest-xray/train)"
    )
    caption_column: str = option("text", "data", "column with the captions")
    image_column: str = option("image", "data", "column with the images, for a data set on the hub")
    resolution: int | None = option(None, "data", "side of the training images in pixels (default: the model's own)")
    center_crop: bool = option(False, "data", "crop the middle instead of a random place")
    random_flip: bool = option(False, "data", "mirror half of the images (not for images with a left and a right)")
    max_train_samples: int | None = option(None, "data", "use only that many images, drawn by the seed")
    max_token_length: int = option(120, "data", "T5 tokens of a caption; PixArt-alpha knows at most 120")
    proportion_empty_prompts: float = option(0.0, "data", "share of captions replaced by the empty one, in [0, 1]")
    dataloader_num_workers: int = option(0, "data", "processes that read images ahead")
    cache_latents: bool = option(False, "data", "encode every image once (needs crops that don't change)")
    cache_dir: str | None = option(None, "data", "where downloads are kept (default: the hub's own cache)")

    rank: int = option(8, "LoRA", "rank of the adapters of the transformer and of T5")
    lora_alpha: float | None = option(None, "LoRA", "scale of the adapters times the rank (default: the rank)")
    no_text_encoder_lora: bool = option(False, "LoRA", "leave T5 as it is")

    no_hldf: bool = option(False, "HLDF", "plain latent fine-tuning, without the colour loss")
    N_steps: int = option(500, "HLDF", "colour loss at every N-th optimiser step, counted from 0")
    M_times: int = option(20, "HLDF", "DPM-Solver++ steps of the sampled image")
    hldf_gradient: str = option("full", "HLDF", "which part of the rollout carries gradient", GRADIENT_MODES[:-1])
    hldf_k: int = option(5, "HLDF", "the k of last_k (last k steps) and sparse (every k-th step)")
    hldf_batch_size: int = option(1, "HLDF", "images of the batch that take part, per process")
    hldf_guidance_scale: float = option(4.5, "HLDF", "classifier-free guidance of the sampled image")
    color_loss_weight: float | None = option(None, "HLDF", "weight of the colour loss (default: 1 / M_times)")

    train_batch_size: int = option(1, "training", "images per process and micro-batch")
    gradient_accumulation_steps: int = option(1, "training", "micro-batches per optimiser step")
    num_train_epochs: int = option(15, "training", "passes over the data, unless --max_train_steps is given")
    max_train_steps: int | None = option(None, "training", "optimiser steps in all")
    learning_rate: float = option(1e-4, "training", "peak learning rate")
    lr_scheduler: str = option("constant", "training", "course of the learning rate", SCHEDULERS)
    lr_warmup_steps: int = option(0, "training", "optimiser steps of linear warm-up")
    use_8bit_adam: bool = option(False, "training", "AdamW with 8-bit moments (bitsandbytes)")
    adam_beta1: float = option(0.9, "training", "decay of the first moment")
    adam_beta2: float = option(0.999, "training", "decay of the second moment")
    adam_weight_decay: float = option(1e-2, "training", "decoupled weight decay")
    adam_epsilon: float = option(1e-8, "training", "added to the root of the second moment")
    max_grad_norm: float = option(1.0, "training", "gradients are clipped to this norm")
    mixed_precision: str | None = option(
        None, "training", "precision of the frozen models and the activations (default: what accelerate launch says)",
        ("no", "bf16", "fp16"),
    )  # fmt: skip
    gradient_checkpointing: bool = option(False, "training", "recompute activations in the backward pass")
    seed: int = option(0, "training", "of everything that is random")

    output_dir: str = option("medart", "output", "folder of the run, made when absent")
    checkpointing_steps: int = option(500, "output", "optimiser steps between checkpoints")
    checkpoints_total_limit: int | None = option(None, "output", "keep only that many of them")
    resume_from_checkpoint: str | None = option(
        None, "output", "`latest` or a folder; the same command resumes anyway"
    )
    validation_prompt: list[str] | None = option(  # noqa: RUF009 (a mutable annotation, not a mutable default)
        None, "output", "prompts of the sample grids (default: from the data)"
    )
    num_validation_images: int = option(4, "output", "images per prompt in the sample grids")
    validation_steps: int = option(
        500, "output", "optimiser steps between sample grids; 0: none but the first and last"
    )
    logging_steps: int = option(10, "output", "optimiser steps between entries of log.jsonl")
    report_to: str = option("tensorboard", "output", "tracker beside log.jsonl", TRACKERS)

    def check(self) -> None:
        """Find values that cannot work. Raises UserError naming the flag, the value and the remedy."""
        positive = [
            "N_steps",
            "M_times",
            "hldf_k",
            "hldf_batch_size",
            "rank",
            "train_batch_size",
            "gradient_accumulation_steps",
            "num_train_epochs",
            "max_token_length",
            "checkpointing_steps",
            "logging_steps",
            "num_validation_images",
            "max_grad_norm",
            "learning_rate",
        ]
        optional = ("resolution", "max_train_samples", "max_train_steps", "lora_alpha", "checkpoints_total_limit")
        for name in (*positive, *(name for name in optional if getattr(self, name) is not None)):
            if getattr(self, name) <= 0:
                hint = " (to train without the colour loss: --no_hldf)" if name in ("N_steps", "M_times") else ""
                raise UserError(f"--{name} is {getattr(self, name)}; give a number above 0{hint}")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}; give 0 or more")
        if not 0 <= self.proportion_empty_prompts <= 1:
            raise UserError(f"--proportion_empty_prompts is {self.proportion_empty_prompts}; give a share from 0 to 1")
        if self.hldf_batch_size > self.train_batch_size and not self.no_hldf:
            raise UserError(
                f"--hldf_batch_size {self.hldf_batch_size} is more than --train_batch_size {self.train_batch_size}; "
                "the images of the colour loss are taken from the batch"
            )
        if self.hldf_k > self.M_times and self.hldf_gradient in ("last_k", "sparse"):
            raise UserError(f"--hldf_k {self.hldf_k} is more than --M_times {self.M_times}; give at most that")


def add_options(parser: argparse.ArgumentParser, options_type: type) -> None:
    """Give `parser` one flag per field of a dataclass made of `option` fields, in named groups."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for item, kind in zip(dataclasses.fields(options_type), typing.get_type_hints(options_type).values(), strict=True):
        group, text = item.metadata["group"], item.metadata["help"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        flag = f"--{item.name}"
        if isinstance(kind, types.UnionType):
            kind = next(part for part in typing.get_args(kind) if part is not type(None))
        if kind is bool:
            groups[group].add_argument(flag, action="store_true", help=text)
        elif typing.get_origin(kind) is list:
            groups[group].add_argument(flag, action="append", metavar="TEXT", help=f"{text}; repeatable")
        else:
            shown = text if item.default is None else f"{text} (default: {item.default})"
            metavar = {int: "N", float: "X", str: "TEXT"}[kind] if item.metadata["choices"] is None else None
            groups[group].add_argument(
                flag, type=kind, default=item.default, choices=item.metadata["choices"], metavar=metavar, help=shown
            )


def parse(options_type: type, description: str | None, argv: Sequence[str] | None = None):
    """Read the command line into an instance of `options_type` and check it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, options_type)
    options = options_type(**vars(parser.parse_args(argv)))
    options.check()
    return options


# What may differ between a run and its resumption: none of it touches the course of the training.
FREE_ON_RESUME = frozenset(
    [
        "max_train_steps",
        "num_train_epochs",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "resume_from_checkpoint",
        "validation_prompt",
        "num_validation_images",
        "validation_steps",
        "logging_steps",
        "report_to",
        "dataloader_num_workers",
        "cache_dir",
        "output_dir",
    ]
)
