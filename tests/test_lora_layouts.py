"""A LoRA in the names of other tools loads as the same LoRA, and several LoRAs as their sum."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora import merged_weights, stock, write_run

from medart_core import lora, lora_layouts
from medart_core.errors import UserError

STACKED = {  # PixArt's own layers of a block, from diffusers' names
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",), "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",), "mlp.fc1": ("ff.net.0.proj",), "mlp.fc2": ("ff.net.2",),
}  # fmt: skip
OWN = {
    "x_embedder.proj": "pos_embed.proj", "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2", "t_block.1": "adaln_single.linear",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2", "final_layer.linear": "proj_out",
}  # fmt: skip


def own_name(layer: str, numbered: bool) -> str:
    """diffusers' name of a layer -> PixArt's own; with `numbered` the parts of a matrix are told apart."""
    for own, theirs in OWN.items():
        if layer == theirs:
            return own
    _, number, inner = layer.split(".", 2)
    own, names = next((own, names) for own, names in STACKED.items() if inner in names)
    place = f".{names.index(inner)}" if numbered and len(names) > 1 else ""
    return f"blocks.{number}.{own}{place}"


def renamed(tensors, layout: str) -> dict[str, torch.Tensor]:
    """A file of layout `diffusers` as another tool writes it, alpha half of the rank where it has one."""
    out: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        part, rest = key.split(".", 1)
        layer, side = rest[: -len(".lora_A.weight")], rest[-len("A.weight")]
        text = part == "text_encoder"
        kohya = {"A": "lora_down.weight", "B": "lora_up.weight"}[side]
        scaled = tensor * 2 if side == "B" else tensor
        if layout == "peft":
            out[f"base_model.model.{layer}.lora_{side}.default.weight"] = tensor
        elif layout == "reference":
            out[f"{'text_encoder' if text else 'unet'}.base_model.model.{layer}.lora_{side}.weight"] = tensor
        elif layout == "old diffusers":
            out[f"{part}.{layer}.lora.{'down' if side == 'A' else 'up'}.weight"] = tensor
        elif layout == "onetrainer":
            name = f"lora_te_{layer}" if text else f"lora_transformer_{layer}"
            out[f"{name.replace('.', '_')}.{kohya}"] = scaled
            out[f"{name.replace('.', '_')}.alpha"] = torch.tensor(2.0)
        elif layout == "onetrainer, numbered":
            name = f"t5.{layer}" if text else f"transformer.{own_name(layer, True)}"
            out[f"{name}.{kohya}"] = scaled
            out[f"{name}.alpha"] = torch.tensor(2.0)
        elif layout in ("comfyui, own names", "kohya"):
            flat = layout == "kohya"
            own = layer if text else own_name(layer, False)
            name = {
                False: "text_encoders.t5xxl.transformer." if text else "diffusion_model.",
                True: "lora_te1_" if text else "lora_unet_",
            }[flat]
            end = kohya if flat else f"lora_{side}.weight"
            key = f"{name}{own.replace('.', '_') if flat else own}.{end}"
            # q, k and v as one matrix have one A; that of q is taken for all, see the test.
            if key not in out:
                out[key] = tensor
            elif side == "B":
                out[key] = torch.cat([out[key], tensor])
    return out


@pytest.fixture
def run(tmp_path, tiny_pixart):
    write_run(tmp_path / "run", tiny_pixart)
    lora.export(tmp_path / "run", tmp_path / "run.safetensors")
    return tmp_path / "run.safetensors"


@pytest.mark.parametrize(
    "layout",
    ["peft", "reference", "old diffusers", "onetrainer", "onetrainer, numbered", "comfyui, own names", "kohya"],
)
def test_every_layout_is_the_same_lora(run, tmp_path, layout):
    tensors = load_file(run)
    if layout in ("comfyui, own names", "kohya"):  # such a file can only hold stacked layers with one A
        order = {"attn1.to_k": "attn1.to_q", "attn1.to_v": "attn1.to_q", "attn2.to_v": "attn2.to_k"}
        for key in [key for key in tensors if key.endswith("lora_A.weight")]:
            for later, first in order.items():
                if f"{later}." in key:
                    tensors[key] = tensors[key.replace(later, first)]
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, run)
        # B's pieces are stacked in the order q, k, v.
        tensors = dict(
            sorted(tensors.items(), key=lambda item: item[0].replace("to_q", "to_a").replace("to_k", "to_b"))
        )
    expected = lora.read(run)
    save_file(
        {key: tensor.contiguous() for key, tensor in renamed(tensors, layout).items()}, tmp_path / "x.safetensors"
    )
    found = lora.read(tmp_path / "x.safetensors")
    assert found.keys() == expected.keys()
    for part, adapter in expected.items():
        assert found[part].config.lora_alpha == found[part].config.r == 4
        assert set(found[part].config.target_modules or ()) == set(adapter.config.target_modules or ())
        torch.testing.assert_close(found[part].tensors, adapter.tensors, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_input_blocks_1_1_proj_in.lora_down.weight",
        "transformer.proj_out.lokr_w1",
        "unet.x",
        "lora_te2_x.alpha",
    ],
)
def test_foreign_names_are_refused(name, tmp_path):
    assert lora_layouts.place_of(name) is None
    save_file({name: torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=f"it has a tensor {name}; give one of PixArt$"):
        lora.read(tmp_path / "x.safetensors")
    save_file({"transformer.proj_out.dora_scale": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="norms are taken otherwise"):
        lora.read(tmp_path / "x.safetensors")


def test_several_loras_are_the_sum_of_their_updates(run, tmp_path, tiny_pixart):
    write_run(tmp_path / "other", tiny_pixart, lora_alpha=6)
    part_of_it = {key: tensor * 0.5 for key, tensor in load_file(run).items() if "attn1" in key}  # lacks layers and T5
    save_file(part_of_it, tmp_path / "part.safetensors")
    base, both, each = stock(tiny_pixart), stock(tiny_pixart), [stock(tiny_pixart) for _ in range(2)]
    paths = [tmp_path / "other", tmp_path / "part.safetensors"]
    lora.load(both, paths, scale=[0.5, -2.0])
    for pipeline, path, scale in zip(each, paths, (0.5, -2.0), strict=True):
        lora.load(pipeline, path, scale)
    own = {
        f"{part}.{name}": p.detach()
        for part in ("transformer", "text_encoder")
        for name, p in getattr(base, part).named_parameters()
    }
    sums, (one, two) = merged_weights(both), map(merged_weights, each)
    assert sums.keys() == one.keys() and 0 < len(two) < len(one)
    for name, weight in sums.items():
        plain = own[f"{name}.weight"]
        torch.testing.assert_close(
            weight, plain + (one[name] - plain) + (two.get(name, plain) - plain), rtol=1e-4, atol=1e-5
        )
    with pytest.raises(UserError, match="2 LoRAs have 3 strengths"):
        lora.load(stock(tiny_pixart), paths, scale=[1.0, 1.0, 1.0])
    write_run(tmp_path / "dora", tiny_pixart, use_dora=True)
    with pytest.raises(UserError, match="DoRA cannot be added"):
        lora.load(stock(tiny_pixart), [tmp_path / "dora", run])
