"""What a run will take, said before it starts: parameters, download, memory of each part, and seconds per step.

Activations are counted in values that were measured at full size under bf16 autocast: for its backward pass, a block
of the transformer keeps 23.6 values per token and channel, a layer of T5 32.6, the VAE decoder 45.3 per pixel and
channel of its last block; when it is checkpointed, a block keeps its input only. GB are 1e9 bytes, as torch reports
them; cards are sold in GiB.
"""

import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers import T5Config, T5EncoderModel

from medart_core import full_size, lora_layers, pretrained
from medart_core.errors import UserError
from medart_core.run import Run

TRANSFORMER_KEPT, TEXT_KEPT, DECODER_KEPT = 23.6, 32.6, 45.3
DECODER_CHECKPOINTED = 0.33  # of the decoder's activations, when one of its blocks at a time has them
BYTES_PER_WEIGHT = {"int8": 1.0, "nf4": 0.516}  # of T5's blocks; NF4 with its doubly quantised scales
WORKSPACE_GB = 1.1  # CUDA's context, and what lives within one operation
MODELS = ("text_encoder", "vae", "transformer")

# Options for a card of so many GiB at batch 1, 512 px and 120 tokens: quantised only where it must be, and recomputed
# only what would not fit. (The whole rollout without checkpoints takes 67 GB by itself: no margin in 80 GiB.)
PRESETS: dict[str, dict[str, Any]] = {
    "8gb": {
        "text_encoder_quantization": "nf4", "gradient_checkpointing": True, "hldf_checkpointing": "nested",
        "hldf_merge_lora": False,
    },
    "12gb": {
        "text_encoder_quantization": "nf4", "gradient_checkpointing": False, "hldf_checkpointing": "blocks",
        "hldf_merge_lora": True,
    },
    "16gb": {
        "text_encoder_quantization": None, "gradient_checkpointing": True, "hldf_checkpointing": "nested",
        "hldf_merge_lora": False,
    },
    "24gb": {
        "text_encoder_quantization": None, "gradient_checkpointing": False, "hldf_checkpointing": "blocks",
        "hldf_merge_lora": True,
    },
    "80gb": {
        "text_encoder_quantization": None, "gradient_checkpointing": False, "hldf_checkpointing": "blocks",
        "hldf_merge_lora": True,
    },
}  # fmt: skip


# --- The model ---


@dataclass(frozen=True)
class Shapes:
    """The sizes that a pipeline's memory depends on: parameters by part, and what activations are made of."""

    transformer: int
    text_encoder: int
    vae: int
    text_embedding: int
    transformer_lora_per_rank: int
    text_encoder_lora_per_rank: int
    blocks: int
    width: int
    text_layers: int
    text_width: int
    vae_width: int
    image_size: int
    pixels_per_token: int

    @classmethod
    def of(cls, text_encoder: Any, vae: Any, transformer: Any) -> "Shapes":
        """Read off models on the meta device, which get adapters in passing."""
        text, config = text_encoder.config, transformer.config
        vae_widths = vae.config.block_out_channels
        factor = 2 ** (len(vae_widths) - 1)  # pixels per latent along a side
        transformer_count, text_count, vae_count = (_count(model) for model in (transformer, text_encoder, vae))
        return cls(
            transformer=transformer_count,
            text_encoder=text_count,
            vae=vae_count,
            text_embedding=text.vocab_size * text.d_model,
            transformer_lora_per_rank=_adapters(transformer, lora_layers.TRANSFORMER_TARGETS),
            text_encoder_lora_per_rank=_adapters(text_encoder, lora_layers.TEXT_ENCODER_TARGETS),
            blocks=config.num_layers,
            width=config.num_attention_heads * config.attention_head_dim,
            text_layers=text.num_layers,
            text_width=text.d_model,
            vae_width=vae_widths[0],
            image_size=config.sample_size * factor,
            pixels_per_token=(config.patch_size * factor) ** 2,
        )

    @classmethod
    def of_folder(cls, folder: Path) -> "Shapes":
        """Read off the configurations in a pipeline folder; its weights are not touched.

        Raises:
            UserError: if one is missing or damaged.
        """
        try:
            text, vae, transformer = (
                json.loads((folder / part / "config.json").read_text("utf-8")) for part in MODELS
            )
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is no PixArt pipeline folder: {error}; give a folder or a hub id") from error
        with torch.device("meta"):
            return cls.of(
                T5EncoderModel(T5Config.from_dict(text)),
                AutoencoderKL.from_config(vae),
                PixArtTransformer2DModel.from_config(transformer),
            )


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _adapters(model: nn.Module, targets: tuple[str, ...]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in lora_layers.trainable_parameters(lora_layers.attach(model, targets, rank=1)))


def find_model(name: str) -> tuple[Shapes | None, str]:
    """The shapes of a model by folder, hub id or `full_size.NAME`, and one line about its download; loads nothing.

    The shapes are None for an unknown hub id that is not in the cache, or only in part.
    """
    folder = Path(pretrained.find(name))
    if not folder.is_dir():
        cached = _find_in_cache(name)
        if cached is None:
            if name not in (full_size.NAME, full_size.PUBLISHED):
                return None, "of unknown size: the hub has not been asked"
            shapes = Shapes.of(*full_size.build_empty())
            published_gb = 4 * (shapes.transformer + shapes.text_encoder + shapes.vae) / 1e9  # as fp32
            return shapes, "none, the weights are random" if name == full_size.NAME else f"{published_gb:.1f} GB"
        folder = cached
    size = sum(file.stat().st_size for part in pretrained.PARTS for file in (folder / part).rglob("*"))
    return Shapes.of_folder(folder), f"none, {size / 1e9:.2f} GB are on the disk"


def _find_in_cache(name: str) -> Path | None:
    """The folder in the hub's cache that has all configurations of the model `name`."""
    try:
        files = [try_to_load_from_cache(name, f"{part}/config.json") for part in MODELS]
    except HFValidationError:  # no hub id, such as a folder that is not there
        return None
    found = [Path(file).parents[1] for file in files if isinstance(file, str)]
    return found[0] if len(found) == len(MODELS) else None


# --- Memory ---


def predict(
    shapes: Shapes,
    *,
    dtype: torch.dtype = torch.bfloat16,
    train_batch_size: int = 1,
    pixels: int | None = None,
    max_token_length: int = 120,
    rank: int = 8,
    use_8bit_adam: bool = False,
    text_encoder_lora: bool = True,
    text_encoder_quantization: str | None = None,
    gradient_checkpointing: bool = False,
    hldf: bool = True,
    hldf_checkpointing: str = "blocks",
    hldf_merge_lora: bool = False,
    hldf_batch_size: int = 1,
    graph_steps: int = 20,
) -> dict[str, float]:
    """Predicted GB on the device: of what stays, of either kind of step on top of it, and the `peak` of a run.

    `hldf_checkpointing` is `none`, `blocks` or `nested` (blocks within steps, and within the decoder); `graph_steps`
    is the number of rollout steps that carry gradient; `pixels` are an image's, the model's own by default. Without
    adapters on T5 its embeddings are cached and it goes before training: `peak` is then the larger of the two times.
    """
    size, pixels = dtype.itemsize, pixels or shapes.image_size**2
    adapters = rank * (shapes.transformer_lora_per_rank + text_encoder_lora * shapes.text_encoder_lora_per_rank)
    stays = {
        "T5": size * shapes.text_embedding
        + BYTES_PER_WEIGHT.get(text_encoder_quantization or "", size) * (shapes.text_encoder - shapes.text_embedding),
        "transformer and VAE": size * (shapes.transformer + shapes.vae),
        "adapters, gradients, optimiser": adapters * (4 + 4 + (2 if use_8bit_adam else 8)),
        "workspace": WORKSPACE_GB * 1e9,
    }

    def kept(inputs: float, values: float, layers: int, checkpointed: bool) -> float:
        """Bytes for backward of `layers` equal layers, with `inputs` values at the entrance of each."""
        return size * inputs * (layers + values if checkpointed else layers * values)

    def text(captions: int, checkpointed: bool) -> float:
        inputs = captions * max_token_length * shapes.text_width
        return text_encoder_lora * kept(inputs, TEXT_KEPT, shapes.text_layers, checkpointed)

    block_input = pixels / shapes.pixels_per_token * shapes.width
    ordinary = text(train_batch_size, gradient_checkpointing)
    ordinary += kept(train_batch_size * block_input, TRANSFORMER_KEPT, shapes.blocks, gradient_checkpointing)
    rollout = 0.0
    if hldf:
        checkpointed = hldf_checkpointing != "none"
        blocks = shapes.blocks * (1 if hldf_checkpointing == "nested" else graph_steps)
        guided = 2 * hldf_batch_size * block_input  # conditional and unconditional in one batch
        decoder = size * DECODER_KEPT * shapes.vae_width * pixels
        decoder *= DECODER_CHECKPOINTED if checkpointed else hldf_batch_size
        rollout = text(hldf_batch_size + 1, checkpointed) + decoder
        rollout += kept(guided, TRANSFORMER_KEPT, blocks, checkpointed) + hldf_merge_lora * size * shapes.transformer
    training = sum(stays.values()) + max(ordinary, rollout)
    before = sum(stays.values()) - stays["adapters, gradients, optimiser"]  # while T5's embeddings are cached
    peak = training if text_encoder_lora else max(training - stays["T5"], before)
    steps = {"ordinary step": ordinary, "HLDF step": rollout, "peak": peak}
    return {name: value / 1e9 for name, value in (stays | steps).items()}


def describe(name: str, memory_options: dict[str, Any]) -> list[str]:
    """Lines about a model and a run with it, from `find_model` and from `predict` with these options."""
    shapes, download = find_model(name)
    lines = [f"model: {name}; download: {download}"]
    if shapes is None:
        return [*lines, "parameters and memory: not known before the download"]
    adapters = shapes.transformer_lora_per_rank
    if memory_options.get("text_encoder_lora", True):
        adapters += shapes.text_encoder_lora_per_rank
    memory = predict(shapes, **memory_options)
    return [
        *lines,
        f"parameters: transformer {shapes.transformer:,}, T5 {shapes.text_encoder:,}, VAE {shapes.vae:,}; "
        f"trained {adapters * memory_options.get('rank', 8):,}",
        "memory in GB, predicted: " + ", ".join(f"{part} {gb:.2f}" for part, gb in memory.items()),
    ]


# --- Time ---


@dataclass
class TimedRun(Run):
    """A run that notes the seconds between its updates, and is not meant to be saved."""

    marks: list[float] = field(default_factory=lambda: [time.perf_counter()])

    def update(self) -> None:
        """One optimiser step, and a note of when it was done."""
        super().update()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Seconds of each step so far; those of the first one include what happens once."""
        return [end - start for start, end in zip(self.marks, self.marks[1:], strict=False)]


def describe_times(ordinary: Sequence[float], hldf: float | None, max_steps: int, hldf_updates: int) -> list[str]:
    """Lines about measured seconds: of ordinary steps, their median counts, and of one HLDF step, if there is one."""
    middle = statistics.median(ordinary)
    total = middle * (max_steps - hldf_updates) + (hldf or 0.0) * hldf_updates
    measured = f"seconds, measured: ordinary step {middle:.2f}"
    if hldf is not None:
        measured += f", HLDF step {hldf:.2f}"
    hours = math.ceil(total / 360) / 10
    return [measured, f"{max_steps} steps, {hldf_updates} of them with HLDF: about {hours:.1f} hours"]
