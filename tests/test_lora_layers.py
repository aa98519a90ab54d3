"""Where the adapters sit, how many parameters they have, and that they survive a round trip."""

import json

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from transformers import BitsAndBytesConfig, T5Config, T5EncoderModel

from medart_core import lora_layers, pretrained
from medart_core.errors import UserError


def parameters(model) -> int:
    return sum(p.numel() for p in lora_layers.trainable_parameters(model))


def adapted_modules(model):
    return [name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A")]


def test_transformer_adapters_at_full_size():
    """The published PixArt-XL-2-512x512: 610,856,096 parameters, LoRA counts of the reference at rank 8."""
    with torch.device("meta"):
        model = PixArtTransformer2DModel(sample_size=64, caption_channels=4096)
        assert sum(p.numel() for p in model.parameters()) == 610_856_096
        adapted = lora_layers.attach(model, lora_layers.TRANSFORMER_TARGETS, rank=8)
    names = adapted_modules(adapted)
    assert (len(names), parameters(adapted)) == (287, 6_882_688)
    endings = {name.split("transformer_blocks.")[-1].split(".", 1)[-1] for name in names if "blocks" in name}
    assert endings == {f"attn{i}.to_{part}" for i in (1, 2) for part in ("q", "k", "v", "out.0")} | {
        "ff.net.0.proj", "ff.net.2",
    }  # fmt: skip


def test_text_encoder_adapters_at_full_size():
    """T5-XXL: q, k, v, o and the gated feed-forward of all 24 layers."""
    config = T5Config(d_model=4096, d_kv=64, num_heads=64, d_ff=10240, num_layers=24, feed_forward_proj="gated-gelu",
                      vocab_size=32128)  # fmt: skip
    with torch.device("meta"):
        adapted = lora_layers.attach(T5EncoderModel(config), lora_layers.TEXT_ENCODER_TARGETS, rank=8)
    names = adapted_modules(adapted)
    assert (len(names), parameters(adapted)) == (168, 14_548_992)
    assert {name.rsplit(".", 1)[-1] for name in names} == set(lora_layers.TEXT_ENCODER_TARGETS)


def test_adapters_are_fp32_on_a_frozen_bf16_base_and_begin_as_nothing(tiny_pixart):
    model = pretrained.load(tiny_pixart, torch.bfloat16, torch.device("cpu"))
    tokens = torch.arange(5, 13)[None]
    before = model.text_encoder(tokens)[0]
    adapted = lora_layers.attach(model.text_encoder, lora_layers.TEXT_ENCODER_TARGETS, rank=4)
    assert {p.dtype for p in lora_layers.trainable_parameters(adapted)} == {torch.float32}
    assert {p.dtype for p in adapted.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert torch.equal(before, adapted(tokens)[0])


def test_alpha_defaults_to_the_rank():
    assert lora_layers.lora_config(("q",), rank=6).lora_alpha == 6
    assert lora_layers.lora_config(("q",), rank=6, lora_alpha=3).lora_alpha == 3
    plain, both = (
        lora_layers.lora_config(("q",), 6),
        lora_layers.lora_config(("q",), 6, use_dora=True, use_rslora=True),
    )
    assert not (plain.use_dora or plain.use_rslora) and both.use_dora and both.use_rslora


def test_round_trip_through_peft_folders_is_exact(tiny_pixart, tmp_path):
    model = pretrained.load(tiny_pixart, torch.float32, torch.device("cpu"))
    adapted = lora_layers.attach(model.text_encoder, lora_layers.TEXT_ENCODER_TARGETS, rank=4, base="some/base")
    with torch.no_grad():
        for parameter in lora_layers.trainable_parameters(adapted):
            parameter.normal_()
    lora_layers.save(adapted, tmp_path / lora_layers.TEXT_ENCODER_FOLDER)
    folders = lora_layers.find(tmp_path)
    assert folders[0] is None and folders[1] is not None
    assert json.loads((folders[1] / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
    fresh = lora_layers.load(pretrained.load(tiny_pixart, torch.float32, torch.device("cpu")).text_encoder, folders[1])
    tokens = torch.arange(5, 13)[None]
    assert torch.equal(adapted(tokens)[0], fresh(tokens)[0])


def test_a_folder_without_adapters_is_named(tmp_path):
    with pytest.raises(UserError, match="no LoRA in"):
        lora_layers.find(tmp_path)


def test_dora_on_a_quantised_base_is_refused():
    quantised = T5EncoderModel.from_pretrained(
        pretrained.ROOT / pretrained.NANO / "text_encoder", quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    with pytest.raises(UserError, match="unquantised base"):
        lora_layers.attach(quantised, lora_layers.TEXT_ENCODER_TARGETS, rank=4, use_dora=True)
    assert parameters(lora_layers.attach(quantised, lora_layers.TEXT_ENCODER_TARGETS, rank=4)) > 0


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("losses", "gradient", "fault"),
    [
        ([1.0], [1.0, 2.0], 0),
        ([1.0, NAN, INF], [1.0, 2.0], 2),
        ([1.0, -INF], [NAN, 2.0], 2),
        ([1.0], [-INF, 2.0], -1),
        ([1.0], [NAN, 2.0], -1),
        ([1.0], [3e38, 3e38], -1),  # finite, but not its norm
        ([1.0], None, 0),
    ],
)
def test_average_gradients_alone_changes_nothing_and_names_what_is_not_finite(losses, gradient, fault):
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = None if gradient is None else torch.tensor(gradient)
    values = [torch.tensor(loss) for loss in losses]
    assert lora_layers.average_gradients([parameter], values, flag=True) == (True, [fault])
    assert lora_layers.average_gradients([parameter], values) == (False, [fault])
    if gradient is not None:
        torch.testing.assert_close(parameter.grad, torch.tensor(gradient), rtol=0, atol=0, equal_nan=True)
