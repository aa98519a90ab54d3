"""How other tools name the tensors of a PixArt LoRA, brought to PEFT's names: formats only, read off their sources.

What is known, with the layer's name in between:

- PEFT and diffusers: `transformer.`, `text_encoder.`, `base_model.model.`, of PixArt's first training scripts
  `unet.base_model.model.`; `.lora_A.weight`, older `.lora.down.weight`.
- ComfyUI: the same for the transformer, `text_encoders.t5xxl.transformer.` for T5; besides `diffusion_model.` and
  `lora_unet_` before PixArt's own layer names, in which q, k and v are one matrix
  (https://github.com/Comfy-Org/ComfyUI/blob/17358c8f73b581a0d22facc3c385822f09b8bfb1/comfy/lora.py).
- OneTrainer: `lora_transformer_` and `lora_te_` before diffusers' names with underscores for dots, or `transformer.`
  and `t5.` before PixArt's own, q, k and v numbered; `.lora_down.weight`, `.lora_up.weight`, `.alpha`
  (https://github.com/Nerogar/OneTrainer/blob/420b3b99f7b18c89523dc6d111aed09c5acaa4c3/modules/util/convert/lora/convert_pixart_lora.py).
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from medart_core.errors import UserError

PREFIXES = {
    "transformer": (
        "transformer.", "unet.base_model.model.", "diffusion_model.", "model.diffusion_model.", "lora_transformer.",
        "lora_transformer_", "lora_unet_",
    ),
    "text_encoder": (
        "text_encoder.", "text_encoders.t5xxl.transformer.", "text_encoders.transformer.", "t5.", "lora_te.",
        "lora_te_", "lora_te1_",
    ),
}  # fmt: skip
PEFT = "base_model.model."

# PixArt's own names of layers, and diffusers' names of the parts that they are stacked of.
BLOCK = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
AROUND = {
    "x_embedder.proj": ("pos_embed.proj",),
    "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
    "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
    "t_embedder.mlp.0": ("adaln_single.emb.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("adaln_single.emb.timestep_embedder.linear_2",),
    "t_block.1": ("adaln_single.linear",),
    "final_layer.linear": ("proj_out",),
}
T5 = (
    *(f"layer.0.SelfAttention.{name}" for name in "qkvo"),
    *(f"layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")),
)

KINDS = {
    "lora_A": "A", "lora_down": "A", "lora.down": "A", "lora_B": "B", "lora_up": "B", "lora.up": "B",
    "lora_magnitude_vector": "magnitude", "alpha": "alpha",
}  # fmt: skip
NAME = re.compile(rf"(?P<layer>.+)\.(?P<kind>{'|'.join(map(re.escape, KINDS))})(\.default)?(\.weight)?")
SUFFIXES = {"A": ".lora_A.weight", "B": ".lora_B.weight", "magnitude": ".lora_magnitude_vector.weight"}


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _lookup(table: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Flattened names of either kind -> diffusers' names; `qkv.1` is the second part of `qkv`."""
    found = {}
    for own, names in table.items():
        found[_flat(own)] = names
        for place, name in enumerate(names):
            found[_flat(f"{own}.{place}")] = found[_flat(name)] = (name,)
    return found


IN_BLOCK, IN_T5, ELSEWHERE = _lookup(BLOCK), {_flat(name): (name,) for name in T5}, _lookup(AROUND)
PLACES = (
    (re.compile(r"(?:transformer_)?blocks[._](\d+)[._](.+)"), "transformer_blocks", IN_BLOCK),
    (re.compile(r"encoder[._]block[._](\d+)[._](.+)"), "encoder.block", IN_T5),
)


class Place(NamedTuple):
    """Where a tensor belongs: the part of the pipeline, the layer or the layers that it is stacked of, and what it is
    there: A, B, magnitude or alpha."""

    part: str
    layers: tuple[str, ...]
    kind: str


def place_of(name: str) -> Place | None:
    """What a tensor's name says; None for a name that no known layout has."""
    match = NAME.fullmatch(name)
    if match is None:
        return None
    layer, kind = match["layer"], KINDS[match["kind"]]
    candidates = [(part, prefix) for part, prefixes in PREFIXES.items() for prefix in prefixes]
    part, prefix = next((c for c in sorted(candidates, key=lambda c: -len(c[1])) if layer.startswith(c[1])), ("", ""))
    layer = layer.removeprefix(prefix)
    if not part:
        if not layer.startswith(PEFT):
            return None
        part = "text_encoder" if layer.removeprefix(PEFT).startswith("encoder.") else "transformer"
    layer = layer.removeprefix(PEFT)
    for pattern, stem, table in PLACES:
        if (found := pattern.fullmatch(layer)) and (inner := table.get(_flat(found[2]))):
            return Place(part, tuple(f"{stem}.{found[1]}.{inside}" for inside in inner), kind)
    if layers := ELSEWHERE.get(_flat(layer)):
        return Place(part, layers, kind)
    return None if prefix.endswith("_") else Place(part, (layer,), kind)  # another layer, by its name as it stands


def to_peft(tensors: Mapping[str, Tensor], source: object) -> dict[str, dict[str, Tensor]]:
    """A file's tensors by part and by PEFT's names from the part's root, `proj_out.lora_A.weight`; alphas are
    multiplied into B.

    Raises:
        UserError: if there is a tensor that no known layout has.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    alphas: dict[tuple[str, str], float] = {}
    for name, tensor in tensors.items():
        if name.endswith(".dora_scale"):
            raise UserError(
                f"{source} is a DoRA whose norms are taken otherwise than PEFT's; merge it where it was made"
            )
        place = place_of(name)
        if place is None:
            raise UserError(
                f"{source} is no LoRA of PixArt in a layout that is read here: it has a tensor {name}; "
                "give one of PixArt"
            )
        part = parts.setdefault(place.part, {})
        # Layers that are one matrix share A; B and the magnitudes are stacked.
        stacked = place.kind in ("B", "magnitude")
        pieces = tensor.chunk(len(place.layers)) if stacked else [tensor] * len(place.layers)
        for layer, piece in zip(place.layers, pieces, strict=True):
            if place.kind == "alpha":
                alphas[place.part, layer] = float(tensor)
            else:
                part[f"{layer}{SUFFIXES[place.kind]}"] = piece
    for (part, layer), alpha in alphas.items():
        down, up = (f"{layer}{SUFFIXES[kind]}" for kind in "AB")
        if down in parts[part] and up in parts[part] and alpha != parts[part][down].shape[0]:
            parts[part][up] = parts[part][up].float() * (alpha / parts[part][down].shape[0])
    return {part: found for part, found in parts.items() if found}
