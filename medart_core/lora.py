"""One LoRA for everyone: a single file to pass on, loading into a stock pipeline, merging into a pipeline folder.

    from medart_core import lora
    lora.load(pipeline, "medart")  # a stock PixArtAlphaPipeline; a run's folder, a checkpoint or a single file

The file holds plain updates, W + B A: the scale is multiplied into B, so that readers of alpha and readers that take
alpha for the rank agree. Its header holds the configuration as diffusers writes it: JSON under
`lora_adapter_metadata`, names prefixed by the part. Two layouts, which differ in the text encoder's prefix only:

- `diffusers`: `transformer.` and `text_encoder.` before PEFT's names, as diffusers saves the LoRA of those pipelines
  that have a loader (PixArt's has none). OneTrainer reads it, DoRA included, to train the same layers at that rank:
  https://github.com/Nerogar/OneTrainer/blob/221092c0e8cbe64f704cdd876325b5854cb17e38/modules/util/load_lora_util.py
- `comfyui`: ComfyUI maps the same transformer names for PixArt, but calls the text encoder by its place there:
  https://github.com/Comfy-Org/ComfyUI/blob/ec93dcacb96b922f7cb1417b3ba22bccb082df32/comfy/lora.py
  https://github.com/Comfy-Org/ComfyUI/blob/b3be02d6e766a8d3743dcf99cc967118f3ec8e3e/comfy/utils.py
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtAlphaPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medart_core import lean_lora, lora_layers, lora_layouts
from medart_core.errors import UserError
from medart_core.pretrained import PARTS

FILE_NAME = "pytorch_lora_weights.safetensors"
FOLDERS = (lora_layers.TRANSFORMER_FOLDER, lora_layers.TEXT_ENCODER_FOLDER)
LAYOUTS = {
    "diffusers": {"transformer": "transformer", "text_encoder": "text_encoder"},
    "comfyui": {"transformer": "transformer", "text_encoder": "text_encoders.t5xxl.transformer"},
}
CONFIG = ("r", "lora_alpha", "lora_dropout", "bias", "use_dora", "use_rslora", "base_model_name_or_path")
TENSORS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector.weight")


@dataclass
class Adapter:
    """The LoRA of one part of a pipeline; tensors by PEFT's names, from the part's root: `proj_out.lora_A.weight`."""

    config: LoraConfig
    tensors: dict[str, Tensor]


def read(path: str | Path) -> dict[str, Adapter]:
    """The adapters of a run, a checkpoint or a single file, by part: `transformer`, `text_encoder`.

    A file may have any layout of `lora_layouts`.

    Raises:
        UserError: if there are none, or the file is damaged or holds something else.
    """
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    if file.is_file() and not any((path / name / "adapter_config.json").is_file() for name in FOLDERS):
        return _read_file(file)
    folders = zip(("transformer", "text_encoder"), lora_layers.find(path), strict=True)
    return {part: _read_folder(folder) for part, folder in folders if folder}


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A safetensors file's tensors, and the LoRA's configuration in its header (empty where there is none)."""
    try:
        with safe_open(file, "pt") as content:
            metadata = json.loads((content.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
        return load_file(file), metadata
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}; export or download the LoRA again") from error


def _read_folder(folder: Path) -> Adapter:
    tensors, _ = _read_tensors(folder / "adapter_model.safetensors")
    names = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    # PEFT's files leave out the last word of DoRA's magnitudes.
    tensors = {f"{name}.weight" if name.endswith("_vector") else name: tensor for name, tensor in names.items()}
    return Adapter(LoraConfig.from_pretrained(str(folder)), tensors)  # type: ignore[arg-type]


def _read_file(file: Path) -> dict[str, Adapter]:
    tensors, metadata = _read_tensors(file)
    parts = lora_layouts.to_peft(tensors, file)
    return {part: Adapter(_config(file, names, part, metadata), names) for part, names in parts.items()}


def _config(file: Path, tensors: dict[str, Tensor], part: str, metadata: dict[str, Any]) -> LoraConfig:
    """What PEFT needs to know: layers and rank from the tensors, the rest from the header where there is one."""
    downs = {name.removesuffix(TENSORS[0]): tensor for name, tensor in tensors.items() if name.endswith(TENSORS[0])}
    ranks = {tensor.shape[0] for tensor in downs.values()}
    if len(ranks) != 1:
        raise UserError(f"{file} holds the ranks {sorted(ranks)} in the {part}; give one of a single rank")
    rank = ranks.pop()
    return LoraConfig(
        r=rank,
        lora_alpha=metadata.get(f"{part}.lora_alpha", rank),
        use_rslora=metadata.get(f"{part}.use_rslora", False),
        use_dora=any(name.endswith(TENSORS[2]) for name in tensors),
        base_model_name_or_path=metadata.get(f"{part}.base_model_name_or_path"),
        target_modules=list(downs),
    )


def read_several(
    paths: Sequence[str | Path], scale: float | Sequence[float] = 1.0
) -> tuple[dict[str, Adapter], float]:
    """The adapters of a LoRA and its strength; of several, each at its own strength or all at one, their sum and 1.

    Raises:
        UserError: if the strengths are neither one nor as many as the LoRAs, and as `read` and `add` do.
    """
    scales = [scale] if isinstance(scale, int | float) else list(scale)
    scales = scales * len(paths) if len(scales) == 1 else scales
    if len(scales) != len(paths):
        raise UserError(f"{len(paths)} LoRAs have {len(scales)} strengths; give one for each, or one for all")
    found = [read(path) for path in paths]
    return (found[0], scales[0]) if len(found) == 1 else (add(found, scales), 1.0)


def add(adapters: Sequence[dict[str, Adapter]], scales: Sequence[float]) -> dict[str, Adapter]:
    """Several LoRAs as one: the sum of their updates, each times its scale, exactly, at the sum of their ranks.

    A layer becomes W + B A with the As below one another and the scaled Bs side by side, zeros where a LoRA lacks it.

    Raises:
        UserError: if one is a DoRA, whose update is no sum.
    """
    found: dict[str, Adapter] = {}
    for part in dict.fromkeys(part for each in adapters for part in each):
        members = [(each[part], scale) for each, scale in zip(adapters, scales, strict=True) if part in each]
        if any(adapter.config.use_dora for adapter, _ in members):
            raise UserError("a DoRA cannot be added to another LoRA; merge it first: python sample.py --merge")
        names = dict.fromkeys(name for adapter, _ in members for name in adapter.tensors)
        tensors = {name: _side_by_side(name, members) for name in names}
        rank = sum(adapter.config.r for adapter, _ in members)
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            base_model_name_or_path=members[0][0].config.base_model_name_or_path,
            target_modules=[name.removesuffix(TENSORS[0]) for name in names if name.endswith(TENSORS[0])],
        )
        found[part] = Adapter(config, tensors)
    return found


def _side_by_side(name: str, members: Sequence[tuple[Adapter, float]]) -> Tensor:
    """The As of several adapters by rows, or the Bs by columns, times the scales."""
    is_b = name.endswith(TENSORS[1])
    like = next(adapter.tensors[name] for adapter, _ in members if name in adapter.tensors)
    pieces = []
    for adapter, scale in members:
        shape = [*like.shape]
        shape[int(is_b)] = adapter.config.r
        piece = adapter.tensors.get(name, like.new_zeros(shape)).float()
        pieces.append(piece * (scale * _update_scale(adapter.config)) if is_b else piece)
    return torch.cat(pieces, dim=int(is_b))


def _update_scale(config: LoraConfig) -> float:
    return config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)


def base_model(adapters: dict[str, Adapter]) -> str | None:
    """Name of the pipeline that the adapters were made for."""
    return next((adapter.config.base_model_name_or_path for adapter in adapters.values()), None)


def export(source: str | Path, file: str | Path, layout: str = "diffusers", base: str | None = None) -> None:
    """Write the LoRA of a run, a checkpoint or another file as one safetensors file.

    `base` is the name of the base model that the header tells, by default the one that the LoRA has.

    Raises:
        UserError: for DoRA in ComfyUI's layout. ComfyUI divides by the norm of W where DoRA has that of W + B A
            (https://github.com/comfyanonymous/ComfyUI/blob/9c0cf36cd7964978850fd40f8cf76ac2cf9f9e15/comfy/weight_adapter/base.py).
    """
    tensors, metadata = {}, {}
    for part, adapter in read(source).items():
        config = adapter.config
        if config.use_dora and layout == "comfyui":
            raise UserError(f"{source} is a DoRA, which ComfyUI reads otherwise; merge it: python sample.py --merge")
        scale = _update_scale(config)
        for name, tensor in adapter.tensors.items():
            scaled = scale != 1 and name.endswith(TENSORS[1])
            tensors[f"{LAYOUTS[layout][part]}.{name}"] = tensor.float() * scale if scaled else tensor
        values = config.to_dict() | {"lora_alpha": config.r, "use_rslora": False}
        values["base_model_name_or_path"] = base or config.base_model_name_or_path
        metadata |= {f"{part}.{key}": values[key] for key in CONFIG}
        metadata[f"{part}.target_modules"] = sorted(config.target_modules or ())
    header = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(metadata, indent=2, sort_keys=True)}
    save_file(tensors, file, header)


def load(pipeline, path: str | Path | Sequence[str | Path], scale: float | Sequence[float] = 1.0) -> None:
    """Put a LoRA, or the sum of several, into a pipeline of frozen models; see `read` for paths and `apply`."""
    apply(pipeline, *read_several([path] if isinstance(path, str | Path) else path, scale))


def apply(pipeline, adapters: dict[str, Adapter], scale: float = 1.0) -> None:
    """Put adapters into the `transformer` and the `text_encoder` of anything that has them, in place.

    Layers become W + scale * B A; the adapters are fp32 where the base has 16 bits.

    Raises:
        UserError: if there is a LoRA already, the LoRA belongs to another model, or `scale` is not 1 for a DoRA
            (its update is not proportional to it).
    """
    for part, adapter in adapters.items():
        model: nn.Module = getattr(pipeline, part)
        if any(isinstance(layer, LoraLayer) for layer in model.modules()):
            raise UserError(f"the {part} has a LoRA already; load the pipeline again for another one")
        if adapter.config.use_dora and scale != 1:
            raise UserError(f"the LoRA is a DoRA, which has no strength; leave the scale at 1 instead of {scale}")
        tensors = {f"base_model.model.{name}": tensor for name, tensor in adapter.tensors.items()}
        try:
            wrapper = PeftModel(model, adapter.config)  # type: ignore[arg-type]
            result = set_peft_model_state_dict(wrapper, tensors)
            unread = [*result.unexpected_keys, *(key for key in result.missing_keys if ".lora_" in key)]
        except (RuntimeError, ValueError) as error:  # other shapes, or none of the layers
            unread = [str(error).splitlines()[-1].strip().rstrip(".")]
        if unread:
            raise UserError(f"the LoRA does not belong to this {part}: {unread[0]}; use the model it was made for")
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.scale_layer(scale)
        lean_lora.enable(model)
        model.requires_grad_(False).eval()


@contextmanager
def applied(pipeline, adapters: dict[str, Adapter], scale: float = 1.0) -> Iterator[None]:
    """Within it the adapters are on the pipeline, see `apply`; after it there is no LoRA, and no bit of it is left."""
    try:
        apply(pipeline, adapters, scale)
        yield
    finally:
        for part in adapters:
            model: nn.Module = getattr(pipeline, part)
            for place, layer in _layers(model):
                model.set_submodule(place, layer.get_base_layer())
            if hasattr(model, "peft_config"):  # by which PEFT would take the model for one with adapters
                del model.peft_config


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(place, layer) for place, layer in model.named_modules() if isinstance(layer, LoraLayer)]


def merge(pipeline, folder: Path) -> None:
    """Write a PixArtAlphaPipeline folder with the LoRA merged into the weights; `pipeline` keeps them merged.

    The tensors get the dtype that they have in the base's own files; load the base in fp32, so that they are rounded
    once only. The text encoder's configuration says float32, since stock loading brings the other parts to float32
    and would mix dtypes otherwise.
    """
    parts = {name: getattr(pipeline, name) for name in PARTS}
    for name in ("text_encoder", "vae", "transformer"):
        model: nn.Module = parts[name]
        for place, layer in _layers(model):
            layer.merge(safe_merge=True)
            model.set_submodule(place, layer.get_base_layer())
        nn.Module.to(model, stored_dtype(model, name))  # diffusers' own warns of modules that PixArt has not
    PixArtAlphaPipeline(**parts).save_pretrained(folder)
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def stored_dtype(model: Any, subfolder: str) -> torch.dtype:
    """The dtype of a loaded part in the safetensors it came from; where there are none, the one it has now."""
    name = getattr(model.config, "_name_or_path", "")  # the pipeline's folder, the part's own, or a hub id
    if not name:  # built, not loaded
        return next(model.parameters()).dtype
    source = Path(name)
    if not source.is_dir():
        source = Path(snapshot_download(str(source), local_files_only=True))
    files = [*(source / subfolder).glob("*.safetensors")] or [*source.glob("*.safetensors")]
    if not files:
        return next(model.parameters()).dtype
    with safe_open(min(files, key=lambda file: len(file.name)), "pt") as content:  # a variant's name is longer
        return content.get_tensor(min(content.keys())).dtype
