"""Low-rank adapters of the transformer and of T5: where they sit, how they are attached, saved and loaded."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from medart_core import lean_lora
from medart_core.errors import UserError

TRANSFORMER_FOLDER = "transformer_lora"
TEXT_ENCODER_FOLDER = "text_encoder_lora"

# The layers that the paper's code adapts: every projection of the blocks, and the embedders around them.
# https://github.com/clguo/medart/blob/9647a926b1/medart.py#L522-L541 (its "proj_in" exists nowhere in PixArt)
TRANSFORMER_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2",
    "proj", "proj_out", "linear", "linear_1", "linear_2",
)  # fmt: skip
# T5 v1.1 has a gated feed-forward, wi_0 and wi_1; the name "wi" of the original T5 would match nothing.
TEXT_ENCODER_TARGETS = ("q", "k", "v", "o", "wi_0", "wi_1", "wo")


def lora_config(
    targets: tuple[str, ...],
    rank: int,
    lora_alpha: float | None = None,
    use_dora: bool = False,
    use_rslora: bool = False,
) -> LoraConfig:
    """A Gaussian-initialised LoRA without dropout.

    `lora_alpha` defaults to the rank. The update's scale is lora_alpha / rank, with `use_rslora` lora_alpha /
    sqrt(rank) (arXiv:2312.03732); `use_dora` trains the rows' norms apart from their directions (arXiv:2402.09353).
    """
    return LoraConfig(
        r=rank,
        lora_alpha=rank if lora_alpha is None else lora_alpha,  # type: ignore[arg-type]  # PEFT takes floats
        init_lora_weights="gaussian",
        target_modules=list(targets),
        use_dora=use_dora,
        use_rslora=use_rslora,
    )


def attach(
    model: nn.Module,
    targets: tuple[str, ...],
    rank: int,
    lora_alpha: float | None = None,
    base: str | None = None,
    use_dora: bool = False,
    use_rslora: bool = False,
) -> PeftModel:
    """Freeze `model` and put trainable fp32 adapters on `targets`; the base keeps its dtype.

    `base` is the name of the pipeline that the adapters belong to, and is saved with them.

    Raises:
        UserError: for DoRA on a quantised base: with bitsandbytes on the CPU, int8 fails at the second backward, and
            NF4 does not begin as the base (peft 0.21, bitsandbytes 0.50).
    """
    if use_dora and getattr(model, "is_quantized", False):
        raise UserError("DoRA needs an unquantised base; leave out --use_dora or the quantisation")
    model.requires_grad_(False)
    config = lora_config(targets, rank, lora_alpha, use_dora, use_rslora)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=True)  # type: ignore[arg-type]
    adapted.peft_config["default"].base_model_name_or_path = base
    if use_dora:
        _measure_magnitudes(adapted)
    lean_lora.enable(adapted)
    return adapted  # type: ignore[return-value]


def _measure_magnitudes(model: nn.Module) -> None:
    """Set DoRA's magnitudes to the rows' norms in fp32: PEFT rounds them to the base's dtype.

    The forward divides by the fp32 norm, so on a bf16 base every row would begin up to 0.4 % off.
    """
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            weight: Any = layer.get_base_layer().weight.float()
            magnitude: Any = layer.lora_magnitude_vector["default"]
            magnitude.weight.data = magnitude.get_weight_norm(weight, torch.zeros_like(weight), 1.0)


def trainable_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The adapters' parameters, in the model's order."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors by parameter name: what a checkpoint keeps of a model."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_adapter_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put the tensors of `adapter_state` back in place; names and shapes must agree exactly."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if parameters.keys() != state.keys():
        raise UserError(
            "the checkpoint's adapters are not those of this model; resume with the options it was made with"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """All gradients as one fp32 vector; a parameter without one counts as zeros."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters])


def fault(parameters: Sequence[nn.Parameter], losses: Sequence[Tensor]) -> Tensor:
    """What is not finite in this process, on the device: 0 nothing, i + 1 loss i as the first, -1 the gradient alone.

    A gradient whose norm overflows counts too: clipping would make zeros of it.
    """
    bad = ~torch.stack(list(losses)).isfinite()
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return torch.where(bad.any(), bad.int().argmax() + 1, -(~norm.isfinite()).int())


def average_gradients(
    parameters: Sequence[nn.Parameter], losses: Sequence[Tensor], flag: bool = False
) -> tuple[bool, list[int]]:
    """Replace each gradient by its mean over the processes, in one message that carries two more words of each.

    Returns whether any process raised `flag`, and every process's `fault`, the same everywhere: all of them stop, or
    none. Done once per optimiser step and by hand, since DistributedDataParallel wants one forward for one backward:
    HLDF has M forwards, and the micro-batches before it have backwards of their own.

    Reading the faults is the one wait for the device in a step. It has to be: an update with a NaN cannot be undone,
    and 8-bit Adam has no switch on the device that leaves one out. Of the host's lead it costs the launches of the
    optimiser and of the next batch; the forward and backward passes are queued without a wait.
    """
    mine = fault(parameters, losses)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flag, [int(mine.item())]
    rank, num_processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    words = torch.zeros(1 + num_processes, device=mine.device)
    words[0], words[1 + rank] = float(flag), mine
    message = torch.cat([gradients(parameters), words])
    torch.distributed.all_reduce(message)
    average, words = message.split([len(message) - len(words), len(words)])
    chunks = average.div_(num_processes).split([p.numel() for p in parameters])
    for parameter, chunk in zip(parameters, chunks, strict=True):
        parameter.grad = chunk.view_as(parameter).to(parameter.dtype)
    flags, *faults = words.tolist()
    return flags > 0, [int(word) for word in faults]


def save(model: nn.Module, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, as PEFT defines them; nothing without adapters."""
    if isinstance(model, PeftModel):
        # Embeddings are never trained here; "auto" would look for the base model's vocabulary on the hub.
        model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
        file = folder / "adapter_config.json"
        config = json.loads(file.read_text())
        config["target_modules"] = sorted(config["target_modules"])  # PEFT writes a set, in another order each time
        file.write_text(json.dumps(config, indent=2, sort_keys=True))


def find(folder: Path) -> tuple[Path | None, Path | None]:
    """The transformer's and the text encoder's adapter folders in a run's output folder.

    Raises:
        UserError: if there is neither.
    """
    found = [folder / name for name in (TRANSFORMER_FOLDER, TEXT_ENCODER_FOLDER)]
    found = [path if (path / "adapter_config.json").is_file() else None for path in found]
    if not any(found):
        raise UserError(
            f"no LoRA in {folder}: expected {TRANSFORMER_FOLDER}/ or {TEXT_ENCODER_FOLDER}/ with adapter_config.json, "
            "as medart.py writes them, or a .safetensors file"
        )
    return found[0], found[1]


def load(model: nn.Module, folder: Path | None) -> nn.Module:
    """`model` with the adapters of `folder` in evaluation mode; without a folder, `model` itself."""
    if folder is None:
        return model
    adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=False).eval()  # type: ignore[arg-type]
    lean_lora.enable(adapted)
    return adapted
