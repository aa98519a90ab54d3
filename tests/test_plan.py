"""The memory plan against the table it comes from, the cards it is for, and what a real model keeps."""

import dataclasses
import shutil
from typing import Any

import pytest
import torch

from medart_core import full_size, lora_layers, plan, pretrained
from medart_core.errors import UserError
from medart_core.text import encode_prompts

GIB = 2**30 / 1e9


@pytest.fixture(scope="module")
def shapes():
    return plan.Shapes.of(*full_size.build_empty())


def test_shapes_are_the_published_ones(shapes):
    assert dataclasses.asdict(shapes) == {
        "transformer": 610_856_096, "text_encoder": 4_762_310_656, "vae": 83_653_863,
        "text_embedding": 32128 * 4096, "transformer_lora_per_rank": 6_882_688 // 8,
        "text_encoder_lora_per_rank": 14_548_992 // 8, "blocks": 28, "width": 1152, "text_layers": 24,
        "text_width": 4096, "vae_width": 128, "image_size": 512, "pixels_per_token": 256,
    }  # fmt: skip


# GB with T5 in bf16, int8 and NF4, at batch 1, 512 px, 120 tokens, rank 8 and M = 20, worked out by hand.
TABLE = [
    ("static", {}, (11.2, 6.5, 4.3)),
    ("ordinary step", {}, (15.3, 10.7, 8.5)),
    ("HLDF step", {"hldf_checkpointing": "blocks"}, (16.0, 11.3, 9.1)),
    ("HLDF step", {"hldf_checkpointing": "nested"}, (13.6, 8.9, 6.7)),
]


@pytest.mark.parametrize(("part", "choices", "expected"), TABLE)
def test_predictions_agree_with_the_table(shapes, part, choices, expected):
    for quantization, gb in zip((None, "int8", "nf4"), expected, strict=True):
        memory = plan.predict(shapes, text_encoder_quantization=quantization, **choices)
        static = sum(memory[name] for name in ("T5", "transformer and VAE", "adapters, gradients, optimiser"))
        total = static if part == "static" else static + memory["workspace"] + memory[part]
        assert total == pytest.approx(gb, rel=0.1)


@pytest.mark.parametrize("card", plan.PRESETS)
def test_a_preset_fits_its_card_with_a_tenth_to_spare(shapes, card):
    memory = plan.predict(shapes, **plan.PRESETS[card])
    assert memory["peak"] < 0.9 * int(card.removesuffix("gb")) * GIB


def test_a_smaller_card_has_no_looser_preset(shapes):
    peaks = [plan.predict(shapes, **preset)["peak"] for preset in plan.PRESETS.values()]
    assert peaks == sorted(peaks)


def test_the_whole_rollout_without_checkpoints_fits_no_card(shapes):
    memory = plan.predict(shapes, hldf_checkpointing="none")
    assert memory["HLDF step"] > 62 and memory["peak"] > 0.9 * 80 * GIB


def test_what_each_choice_costs(shapes):
    peak = {
        name: plan.predict(shapes, **choice)["peak"]
        for name, choice in {
            "as it is": {}, "fewer graph steps": {"graph_steps": 5}, "no HLDF": {"hldf": False},
            "8-bit Adam": {"use_8bit_adam": True}, "frozen T5": {"text_encoder_lora": False},
            "merged": {"hldf_merge_lora": True}, "fp32": {"dtype": torch.float32}, "batch": {"hldf_batch_size": 2},
            "pixels": {"pixels": 1024**2},
        }.items()
    }  # fmt: skip
    usual = peak.pop("as it is")
    more = {name for name, gb in peak.items() if gb > usual}
    assert more == {"fp32", "batch", "pixels", "merged"} and all(gb != usual for gb in peak.values())
    assert peak["frozen T5"] == pytest.approx(9.52 + 1.39 + 1.1, abs=0.02)  # T5 goes before training


def kept_bytes(model, compute) -> int:
    """Bytes that autograd saves for backward beside the model's own parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        compute()
    return sum(storage.nbytes() for address, storage in saved.items() if address not in own)


def test_activations_of_a_real_block_and_layer_are_the_predicted_ones(shapes, monkeypatch):
    """One block of the transformer at full width, and one layer of T5 at a quarter of it."""
    changes = {
        "transformer": {"num_layers": 2, "caption_channels": 1024},
        "text_encoder": {"num_layers": 2, "d_model": 1024, "d_ff": 2560, "num_heads": 16},
        "vae": {"block_out_channels": (32,) * 4},
    }
    for part, change in changes.items():
        monkeypatch.setitem(full_size.SHAPES, part, full_size.SHAPES[part] | change)
    model = full_size.build_random(torch.bfloat16, torch.device("cpu"))
    model.transformer = lora_layers.attach(model.transformer, lora_layers.TRANSFORMER_TARGETS, rank=8)
    model.text_encoder = lora_layers.attach(model.text_encoder, lora_layers.TEXT_ENCODER_TARGETS, rank=8)
    embeds, mask = torch.randn(1, 120, 1024, dtype=torch.bfloat16), torch.ones(1, 120, dtype=torch.long)
    latents, conditions = torch.randn(1, 4, 64, 64), {"resolution": None, "aspect_ratio": None}

    def denoise():
        model.transformer(latents, embeds, torch.tensor([500]), conditions, encoder_attention_mask=mask)

    def encode():
        encode_prompts(model.tokenizer, model.text_encoder, ["word " * 200])

    for network, layers, compute, unit in (
        (model.transformer.base_model.model, "transformer_blocks", denoise, plan.TRANSFORMER_KEPT * 1024 * 1152 * 2),
        (model.text_encoder.base_model.model.encoder, "block", encode, plan.TEXT_KEPT * 120 * 1024 * 2),
    ):
        both = kept_bytes(network, compute)
        setattr(network, layers, getattr(network, layers)[:1])
        assert both - kept_bytes(network, compute) == pytest.approx(unit, rel=0.1)


def test_models_are_described_without_loading_them(tiny_pixart, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(pretrained, "load", None)
    published = plan.describe(full_size.PUBLISHED, {"rank": 8})
    assert "download: 21.8 GB" in published[0] and "trained 21,431,680" in published[1]
    assert "peak 16." in published[2]
    assert "weights are random" in plan.describe(full_size.NAME, {})[0]
    tiny = shutil.copytree(tiny_pixart, tmp_path / "pixart")
    for file in tiny.rglob("*.safetensors"):
        file.write_bytes(b"not weights")
    assert "on the disk" in plan.describe(str(tiny), {})[0] and "VAE 0.0" not in plan.describe(str(tiny), {})[1]
    assert plan.describe("some/model-nobody-has", {})[1].endswith("not known before the download")


def test_a_folder_that_is_no_pipeline_is_named(tiny_pixart, tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path} is no PixArt pipeline folder"):
        plan.describe(str(tmp_path), {})
    folder = shutil.copytree(tiny_pixart, tmp_path / "pixart")
    (folder / "vae" / "config.json").write_text("{")
    with pytest.raises(UserError, match=f"^{folder} is no PixArt pipeline folder"):
        plan.describe(str(folder), {})


def test_a_name_nowhere_and_a_cache_in_part_are_of_unknown_size(monkeypatch, tmp_path):
    config = tmp_path / "transformer" / "config.json"
    found = {"transformer/config.json": str(config)}
    monkeypatch.setattr(plan, "try_to_load_from_cache", lambda name, file: found.get(file))
    assert plan.find_model("some/model")[0] is None
    monkeypatch.undo()
    assert plan.find_model("/nosuch")[0] is None


def test_times_are_those_between_updates(monkeypatch):
    clock = iter([0.0, 5.0, 6.0, 7.5, 17.5])
    monkeypatch.setattr(plan.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(plan.Run, "update", lambda self: None)
    nothing: Any = None
    run = plan.TimedRun(nothing, [], nothing, nothing, nothing)
    for _ in range(4):
        run.update()
    *ordinary, hldf = run.seconds
    assert (ordinary, hldf) == ([5.0, 1.0, 1.5], 10.0)
    lines = plan.describe_times(ordinary, hldf, 1000, 2)
    assert lines == [
        "seconds, measured: ordinary step 1.50, HLDF step 10.00",
        "1000 steps, 2 of them with HLDF: about 0.5 hours",
    ]
    assert "HLDF step" not in plan.describe_times(ordinary, None, 1000, 0)[0]
