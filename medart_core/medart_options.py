"""The options of medart.py: everything it can be told, with defaults, groups and checks."""

import math
import typing
from dataclasses import dataclass

from diffusers_grad import GRADIENT_MODES
from medart_core import quantization
from medart_core.errors import UserError
from medart_core.objectives import COLOR_LOSSES, ROLLOUTS
from medart_core.options import option
from medart_core.plan import PRESETS

SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
TRACKERS = ("tensorboard", "wandb", "all", "none")
CHECKPOINTING = ("none", "blocks", "nested")
NOT_NEGATIVE = (
    "seed", "noise_offset", "num_validation_images", "validation_steps", "lr_warmup_steps", "dataloader_num_workers",
    "adam_weight_decay", "adam_epsilon",
)  # fmt: skip
PATCH_PIXELS = 16  # PixArt's patches of 2 x 2 latents, each of 8 x 8 pixels


def resolution(text: str) -> int | str:
    """`512` -> 512, the side of a square; `384x640` (height x width) stays as it is written; else a ValueError."""
    sides = [int(side) for side in text.split("x", 1)]
    return sides[0] if len(sides) == 1 else text


def image_sides(value: int | str) -> int | tuple[int, int]:
    """The side of a square, or (height, width), of a value that `resolution` has read."""
    if isinstance(value, int):
        return value
    height, width = value.split("x")
    return int(height), int(width)


@dataclass
class MedArtOptions:
    """Everything that `medart.py` can be told; the flags of the published command keep their names."""

    pretrained_model_name_or_path: str | None = option(
        None, "model", "PixArt-alpha folder or hub id (default: nano/pixart)"
    )
    revision: str | None = option(None, "model", "revision of the model and of a data set on the hub")
    variant: str | None = option(None, "model", "file variant of the model's weights, such as fp16")
    random_weights: bool = option(
        False,
        "model",
        "the published model's shapes with random weights instead of any other: to try and to measure",
    )
    text_encoder_quantization: str | None = option(
        None, "model", "keep T5's frozen weights in 8 or 4 bits (bitsandbytes)", quantization.KINDS
    )

    dataset_name: str | None = option(
        None, "data", "folder with images and metadata.csv, or hub id (default: dataset/chest-xray/train)"
    )
    caption_column: str = option("text", "data", "column with the captions; none: only empty ones")
    image_column: str = option("image", "data", "column with the images, for a data set on the hub")
    resolution: int | str | None = option(
        None, "data", "side of the images in pixels, or height x width as in 384x640 (default: the model's own)",
        read=resolution,
    )  # fmt: skip
    validation_data_dir: str | None = option(
        None, "data", "folder of held-out images for the validation loss (default: val/ beside the data, if there)"
    )
    max_validation_samples: int = option(64, "data", "use only that many held-out images, drawn by the seed")
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
    use_dora: bool = option(False, "LoRA", "decompose the weights into magnitude and direction (arXiv:2402.09353)")
    use_rslora: bool = option(False, "LoRA", "scale by alpha / sqrt(rank) instead of alpha / rank (arXiv:2312.03732)")
    no_text_encoder_lora: bool = option(False, "LoRA", "leave T5 as it is: embeddings are cached and T5 is unloaded")

    no_hldf: bool = option(False, "HLDF", "plain latent fine-tuning, without the colour loss")
    N_steps: int = option(500, "HLDF", "colour loss at every N-th optimiser step, counted from 0")
    M_times: int = option(20, "HLDF", "DPM-Solver++ steps of the sampled image")
    hldf_gradient: str = option("full", "HLDF", "which part of the rollout carries gradient", GRADIENT_MODES[:-1])
    hldf_k: int = option(5, "HLDF", "the k of last_k (last k steps) and sparse (every k-th step)")
    hldf_batch_size: int = option(1, "HLDF", "images of the batch that take part, per process")
    hldf_guidance_scale: float = option(4.5, "HLDF", "classifier-free guidance of the sampled image")
    hldf_checkpointing: str | None = option(
        None, "HLDF", "recompute in the rollout: nothing, blocks, or blocks within steps (memory flat in M) "
        "(default: nested with --gradient_checkpointing, else none)", CHECKPOINTING,
    )  # fmt: skip
    hldf_merge_lora: bool | None = option(
        None, "HLDF", "merge the adapters into a copy of the weights for each rollout: faster (default: unless nested "
        "checkpointing is to save memory)",
    )  # fmt: skip
    mask_overlay: bool = option(
        False, "HLDF", "leave black borders and the green inset of endoscopes out of the colours"
    )
    color_loss: str = option(
        "paper", "HLDF", "the published squares, which also reward images of one colour, or the unbiased distance of "
        "colour distributions from two rollouts per prompt", tuple(COLOR_LOSSES),
    )  # fmt: skip
    color_loss_weight: float | None = option(None, "HLDF", "weight of the colour loss (default: 1 / M_times)")

    train_batch_size: int = option(1, "training", "images per process and micro-batch")
    gradient_accumulation_steps: int = option(1, "training", "micro-batches per optimiser step")
    num_train_epochs: int = option(15, "training", "passes over the data, unless --max_train_steps is given")
    max_train_steps: int | None = option(None, "training", "optimiser steps in all")
    snr_gamma: float | None = option(
        None, "training", "min-SNR weights of the noise loss, 5.0 in the paper (arXiv:2303.09556; default: none)"
    )
    noise_offset: float = option(0.0, "training", "share of noise that is constant over an image, such as 0.05")
    learning_rate: float = option(1e-4, "training", "peak learning rate")
    text_encoder_lr: float | None = option(None, "training", "peak learning rate of T5's adapters (default: the same)")
    scale_lr: bool = option(False, "training", "multiply the rates by processes x accumulation x batch size")
    lr_scheduler: str = option("constant", "training", "course of the learning rate", SCHEDULERS)
    lr_warmup_steps: int = option(0, "training", "optimiser steps of linear warm-up")
    lr_num_cycles: int = option(1, "training", "restarts of cosine_with_restarts")
    lr_power: float = option(1.0, "training", "exponent of polynomial")
    use_8bit_adam: bool = option(False, "training", "AdamW with 8-bit moments (bitsandbytes)")
    adam_beta1: float = option(0.9, "training", "decay of the first moment")
    adam_beta2: float = option(0.999, "training", "decay of the second moment")
    adam_weight_decay: float = option(1e-2, "training", "decoupled weight decay")
    adam_epsilon: float = option(1e-8, "training", "added to the root of the second moment")
    max_grad_norm: float = option(1.0, "training", "gradients are clipped to this norm")
    mixed_precision: str | None = option(
        None, "training", "precision of the frozen models and the activations (default: what accelerate launch says)",
        ("no", "bf16"),
    )  # fmt: skip
    preset: str | None = option(None, "training", "options that fit a card of that memory at batch 1", tuple(PRESETS))
    gradient_checkpointing: bool = option(False, "training", "recompute activations in the backward pass")
    compile: bool = option(False, "training", "compile the blocks: minutes at the start, for long runs on a GPU")
    seed: int = option(0, "training", "of everything that is random")

    dry_run: bool = option(False, "output", "print parameters, memory and seconds per step, and stop; writes nothing")
    output_dir: str | None = option(None, "output", "folder of the run (default: medart/ of the project)")
    checkpointing_steps: int = option(500, "output", "optimiser steps between checkpoints")
    checkpoints_total_limit: int | None = option(None, "output", "keep only that many of them")
    resume_from_checkpoint: str | None = option(
        None, "output", "`latest` or a folder; the same command resumes anyway"
    )
    validation_prompt: list[str] | None = option(  # noqa: RUF009 (a mutable annotation, not a mutable default)
        None, "output", "prompts of the sample grids (default: from the data)"
    )
    num_validation_images: int = option(4, "output", "images per prompt in the sample grids; 0: no grids")
    validation_steps: int = option(
        500, "output", "optimiser steps between sample grids and validation losses; 0: none but the first and last"
    )
    logging_steps: int = option(10, "output", "optimiser steps between entries of log.jsonl")
    report_to: str = option("tensorboard", "output", "tracker beside log.jsonl; all: both", TRACKERS)

    def part(self, name: str) -> dict[str, typing.Any]:
        """The options of one of the `PARTS`, to be passed on as named arguments."""
        return {option: getattr(self, option) for option in PARTS[name]}

    def __post_init__(self) -> None:
        if self.hldf_checkpointing is None:
            self.hldf_checkpointing = "nested" if self.gradient_checkpointing else "none"
        if self.hldf_merge_lora is None:
            self.hldf_merge_lora = self.hldf_checkpointing != "nested"

    @property
    def hldf_images(self) -> int:
        """Images that HLDF samples at a time, per process."""
        return self.hldf_batch_size * ROLLOUTS[self.color_loss]

    def repeated(self, captions: list[str]) -> list[str]:
        """Each caption as often as HLDF samples an image of it."""
        return [caption for caption in captions for _ in range(ROLLOUTS[self.color_loss])]

    def memory_options(self) -> dict[str, typing.Any]:
        """What `plan.predict` needs to know of a run, but for its dtype."""
        k, steps = self.hldf_k, self.M_times
        graph_steps = {"full": steps, "last_k": k, "sparse": math.ceil(steps / k), "one_step": 1}
        sides = image_sides(self.resolution) if self.resolution else None
        return {
            "train_batch_size": self.train_batch_size,
            "pixels": math.prod(sides) if isinstance(sides, tuple) else sides and sides**2,
            "max_token_length": self.max_token_length,
            "rank": self.rank,
            "use_8bit_adam": self.use_8bit_adam,
            "text_encoder_lora": not self.no_text_encoder_lora,
            "text_encoder_quantization": self.text_encoder_quantization,
            "gradient_checkpointing": self.gradient_checkpointing,
            "hldf": not self.no_hldf,
            "hldf_checkpointing": self.hldf_checkpointing,
            "hldf_merge_lora": self.hldf_merge_lora,
            "hldf_batch_size": self.hldf_images,
            "graph_steps": graph_steps[self.hldf_gradient],
        }

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
            "max_validation_samples",
            "max_grad_norm",
            "learning_rate",
            "lr_num_cycles",
        ]
        optional = (
            "max_train_samples",
            "max_train_steps",
            "lora_alpha",
            "checkpoints_total_limit",
            "text_encoder_lr",
            "snr_gamma",
        )
        for name in (*positive, *(name for name in optional if getattr(self, name) is not None)):
            if getattr(self, name) <= 0:
                hint = " (to train without the colour loss: --no_hldf)" if name in ("N_steps", "M_times") else ""
                raise UserError(f"--{name} is {getattr(self, name)}; give a number above 0{hint}")
        for name in NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise UserError(f"--{name} is {getattr(self, name)}; give 0 or more")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; give 0 or more, and less than 1")
        if self.color_loss_weight is not None and self.color_loss_weight <= 0 and not self.no_hldf:
            raise UserError(f"--color_loss_weight is {self.color_loss_weight}; to train without it: --no_hldf")
        if not 0 <= self.proportion_empty_prompts <= 1:
            raise UserError(f"--proportion_empty_prompts is {self.proportion_empty_prompts}; give a share from 0 to 1")
        if self.hldf_batch_size > self.train_batch_size and not self.no_hldf:
            raise UserError(
                f"--hldf_batch_size {self.hldf_batch_size} is more than --train_batch_size {self.train_batch_size}; "
                "the images of the colour loss are taken from the batch"
            )
        sides = image_sides(self.resolution) if self.resolution is not None else PATCH_PIXELS
        if any(side <= 0 or side % PATCH_PIXELS for side in (sides if isinstance(sides, tuple) else (sides,))):
            raise UserError(
                f"--resolution is {self.resolution}; give a multiple of {PATCH_PIXELS} such as 512, or height x width "
                "such as 384x640"
            )
        if self.hldf_k > self.M_times and self.hldf_gradient in ("last_k", "sparse"):
            raise UserError(f"--hldf_k {self.hldf_k} is more than --M_times {self.M_times}; give at most that")


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
        "validation_data_dir",
        "max_validation_samples",
        "cache_dir",
        "output_dir",
        "dry_run",
    ]
)


# Which options go to which part of the program.
PARTS = {
    "model": (
        "pretrained_model_name_or_path", "revision", "variant", "cache_dir", "random_weights",
        "text_encoder_quantization", "seed", "rank", "lora_alpha", "use_dora", "use_rslora", "no_text_encoder_lora",
        "gradient_checkpointing",
    ),
    "data": (
        "dataset_name", "validation_data_dir", "max_train_samples", "max_validation_samples", "caption_column",
        "image_column", "revision", "cache_dir", "seed",
    ),
    "loss": (
        "max_token_length", "proportion_empty_prompts", "noise_offset", "snr_gamma",
    ),
    "optimizer": (
        "learning_rate", "text_encoder_lr", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power",
        "adam_beta1", "adam_beta2", "adam_epsilon", "adam_weight_decay", "use_8bit_adam",
    ),
}  # fmt: skip
