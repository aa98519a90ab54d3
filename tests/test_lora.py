"""One file for every reader, the loader against PEFT, and merging; each layout is also read by hand from its keys."""

import json
from dataclasses import fields
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, PixArtAlphaPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from medart_core import lora, lora_layers, pretrained
from medart_core.errors import UserError
from medart_core.pretrained import PixArt
from medart_core.run import Run
from medart_core.sampling import initial_noise, sample_images

CPU = torch.device("cpu")
PARTS = {"transformer": lora_layers.TRANSFORMER_TARGETS, "text_encoder": lora_layers.TEXT_ENCODER_TARGETS}


def write_run(folder, tiny_pixart, dtype=torch.float32, **config) -> PixArt:
    """A run folder with random adapters, and the model that carries them."""
    model = pretrained.load(tiny_pixart, dtype, CPU)
    torch.manual_seed(1)
    for part, targets in PARTS.items():
        adapted = lora_layers.attach(getattr(model, part), targets, 4, base=str(tiny_pixart), **config)
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn_like(parameter)
                parameter.data += parameter * noise.clamp(-1, 1) / 2 if "magnitude" in name else noise / 5
        lora_layers.save(adapted, folder / f"{part}_lora")
        setattr(model, part, adapted.eval())
    return model


@pytest.fixture
def run(tmp_path, tiny_pixart):
    write_run(tmp_path / "run", tiny_pixart)
    return tmp_path / "run"


def stock(folder, dtype=torch.float32) -> PixArtAlphaPipeline:
    pipeline = PixArtAlphaPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def parts(pipeline) -> PixArt:
    """The pipeline's parts as the project's own functions take them."""
    return PixArt(**{f.name: getattr(pipeline, f.name, "") for f in fields(PixArt)})


def images(model, image_size=32):
    drawn = sample_images(model, ["a chest", "hazy"], [3, 4], num_inference_steps=3, image_size=image_size)
    return torch.stack(list(drawn)).int()


def adapted_by_peft(tiny_pixart, run, dtype=torch.float32) -> PixArt:
    """The oracle: PEFT's own loader."""
    model = pretrained.load(tiny_pixart, dtype, CPU)
    folders = lora_layers.find(run)
    model.transformer = lora_layers.load(model.transformer, folders[0])
    model.text_encoder = lora_layers.load(model.text_encoder, folders[1])
    return model


def merged_weights(model) -> dict[str, torch.Tensor]:
    """W of every adapted layer with its update, by part and name, as PEFT computes it."""
    weights = {}
    for part in PARTS:
        root = getattr(model, part)
        root = root.get_base_model() if hasattr(root, "get_base_model") else root
        for name, layer in root.named_modules():
            if isinstance(layer, LoraLayer):
                layer.merge()  # type: ignore[operator]
                weights[f"{part}.{name}"] = layer.get_base_layer().weight.detach().clone()  # type: ignore[operator]
                layer.unmerge()  # type: ignore[operator]
    return weights


def weights_by_hand(file, base, prefixes) -> dict[str, torch.Tensor]:
    """W + B A from the file's keys alone: what a reader does that knows nothing but the layout."""
    tensors, weights = load_file(file), {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            part, prefix = next((part, prefix) for part, prefix in prefixes.items() if name.startswith(prefix + "."))
            module = name.removeprefix(prefix + ".")
            weight = dict(getattr(base, part).named_parameters())[f"{module}.weight"]
            update = tensors[f"{name}.lora_B.weight"].flatten(1) @ tensors[key].flatten(1)
            weights[f"{part}.{module}"] = weight + update.reshape(weight.shape)
    return weights


@pytest.mark.parametrize(
    ("layout", "prefixes"),
    [
        ("diffusers", {"transformer": "transformer", "text_encoder": "text_encoder"}),
        ("comfyui", {"transformer": "transformer", "text_encoder": "text_encoders.t5xxl.transformer"}),
    ],
)
@pytest.mark.parametrize("config", [{}, {"lora_alpha": 6}, {"lora_alpha": 3, "use_rslora": True}])
def test_a_file_read_by_hand_gives_the_weights_of_peft(tmp_path, tiny_pixart, layout, prefixes, config):
    model = write_run(tmp_path / "run", tiny_pixart, **config)
    lora.export(tmp_path / "run", tmp_path / "x.safetensors", layout)
    by_hand = weights_by_hand(tmp_path / "x.safetensors", pretrained.load(tiny_pixart, torch.float32, CPU), prefixes)
    by_peft = merged_weights(model)
    assert by_hand.keys() == by_peft.keys() and len(by_hand) == 27 + 14
    torch.testing.assert_close(by_hand, by_peft, rtol=1e-5, atol=1e-6)
    loaded = stock(tiny_pixart)
    lora.load(loaded, tmp_path / "x.safetensors")
    torch.testing.assert_close(merged_weights(loaded), by_peft, rtol=1e-5, atol=1e-6)


def test_key_names_that_comfyui_and_onetrainer_know(run, tmp_path):
    """Spelled out: ComfyUI looks up these names for PixArt; OneTrainer those of the modules behind the part's name."""
    blocks = [f"transformer_blocks.{n}.{place}" for n in range(2) for place in (
        "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v",
        "attn2.to_out.0", "ff.net.0.proj", "ff.net.2",
    )]  # fmt: skip
    around = [
        "pos_embed.proj", "caption_projection.linear_1", "caption_projection.linear_2", "adaln_single.linear",
        "adaln_single.emb.timestep_embedder.linear_1", "adaln_single.emb.timestep_embedder.linear_2", "proj_out",
    ]  # fmt: skip
    encoder = [f"encoder.block.{n}.layer.{place}" for n in range(2) for place in (
        *(f"0.SelfAttention.{name}" for name in "qkvo"),
        *(f"1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")),
    )]  # fmt: skip
    for layout, prefix in (("diffusers", "text_encoder"), ("comfyui", "text_encoders.t5xxl.transformer")):
        lora.export(run, tmp_path / "x.safetensors", layout)
        names = [f"transformer.{name}" for name in blocks + around] + [f"{prefix}.{name}" for name in encoder]
        expected = {f"{name}.lora_{side}.weight" for name in names for side in "AB"}
        assert load_file(tmp_path / "x.safetensors").keys() == expected


def test_a_run_ends_with_folders_and_file_a_checkpoint_has_folders(tmp_path, tiny_pixart):
    model = write_run(tmp_path / "first", tiny_pixart)
    parameters = [
        *lora_layers.trainable_parameters(model.transformer),
        *lora_layers.trainable_parameters(model.text_encoder),
    ]
    optimizer = torch.optim.AdamW(parameters)
    run = Run(model, parameters, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), tmp_path / "out")
    run.save(limit=None)
    run.save_adapters(run.folder)
    (file,) = run.folder.rglob(lora.FILE_NAME)
    assert file.parent == run.folder
    expected = lora.read(tmp_path / "first")
    for source in (run.folder, run.folder / "checkpoint-0", file):
        found = lora.read(source)
        assert lora.base_model(found) == str(tiny_pixart) and found.keys() == expected.keys()
        for part, adapter in expected.items():
            assert found[part].tensors.keys() == adapter.tensors.keys()
            assert all(torch.equal(found[part].tensors[name], tensor) for name, tensor in adapter.tensors.items())


def test_the_header_is_what_diffusers_reads(tmp_path, tiny_pixart):
    from diffusers.utils.peft_utils import _create_lora_config
    from diffusers.utils.state_dict_utils import _load_sft_state_dict_metadata

    write_run(tmp_path / "run", tiny_pixart, lora_alpha=2, use_rslora=True)
    lora.export(tmp_path / "run", tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as content:
        assert set(content.metadata()) == {"format", LORA_ADAPTER_METADATA_KEY}
    metadata = _load_sft_state_dict_metadata(str(tmp_path / "x.safetensors")) or {}
    for part, targets in PARTS.items():
        own = {key.removeprefix(f"{part}."): value for key, value in metadata.items() if key.startswith(f"{part}.")}
        config = _create_lora_config({}, None, own, {})
        assert config.target_modules == set(targets) and config.base_model_name_or_path == str(tiny_pixart)
        assert config.lora_alpha == config.r == 4 and not config.use_rslora  # the scale is in the tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stock_pipeline_with_the_loader_draws_what_peft_draws(run, tiny_pixart, dtype):
    expected = images(adapted_by_peft(tiny_pixart, run, dtype))
    lora.export(run, run / lora.FILE_NAME)
    for source in (run, run / lora.FILE_NAME):
        pipeline = stock(tiny_pixart, dtype)
        lora.load(pipeline, source)
        adapters = [p for name, p in pipeline.transformer.named_parameters() if ".lora_" in name]
        assert {p.dtype for p in adapters} == {torch.float32} and not any(p.requires_grad for p in adapters)
        assert torch.equal(images(parts(pipeline)), expected)


def test_the_stock_call_agrees(run, tiny_pixart):
    pipeline = stock(tiny_pixart)
    lora.load(pipeline, run)
    drawn: Any = pipeline(
        prompt="a chest", latents=initial_noise([3], 4, 4, 4), num_inference_steps=3, output_type="np",
        use_resolution_binning=False, clean_caption=False, height=32, width=32,
    )  # fmt: skip
    assert (torch.from_numpy(drawn.images[0]) * 255 - images(adapted_by_peft(tiny_pixart, run))[0]).abs().max() <= 1


def test_scale(run, tiny_pixart):
    base = pretrained.load(tiny_pixart, torch.float32, CPU)
    plain = images(base)
    off, half, full = (stock(tiny_pixart) for _ in range(3))
    for pipeline, scale in ((off, 0), (half, 0.5), (full, 1)):
        lora.load(pipeline, run, scale=scale)
    assert torch.equal(images(parts(off)), plain) and not torch.equal(images(parts(full)), plain)
    weights, halves, fulls = merged_weights(off), merged_weights(half), merged_weights(full)
    for name, weight in fulls.items():
        torch.testing.assert_close(halves[name], (weights[name] + weight) / 2)


@pytest.mark.parametrize("config", [{}, {"lora_alpha": 6, "use_rslora": True}, {"use_dora": True}])
def test_merged_folder_in_stock_diffusers(tmp_path, tiny_pixart, config):
    write_run(tmp_path / "run", tiny_pixart, **config)
    pipeline = stock(tiny_pixart)
    lora.load(pipeline, tmp_path / "run")
    expected = images(parts(pipeline))
    lora.merge(pipeline, tmp_path / "merged")
    merged = stock(tmp_path / "merged")
    assert not any("lora" in name for part in PARTS for name in getattr(merged, part).state_dict())
    assert (images(parts(merged)) - expected).abs().max() <= 1
    assert (images(pretrained.load(tmp_path / "merged", torch.float32, CPU)) - expected).abs().max() <= 1


def test_merging_keeps_the_dtype_on_disk(run, tiny_pixart, tmp_path):
    half, folder = stock(tiny_pixart, torch.bfloat16), tmp_path / "half"
    half.text_encoder.to(torch.bfloat16)
    half.save_pretrained(folder)
    for number, pipeline in enumerate((stock(folder), pretrained.load(folder, torch.float32, CPU))):
        merged = tmp_path / f"merged-{number}"
        lora.load(pipeline, run)
        lora.merge(pipeline, merged)
        for part in ("text_encoder", "transformer", "vae"):
            (file,) = (merged / part).glob("*.safetensors")
            assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
        assert json.loads((merged / "text_encoder" / "config.json").read_text())["dtype"] == "float32"
        assert stock(merged).text_encoder.dtype == torch.float32


def test_a_part_that_was_built_and_not_loaded_has_its_own_dtype():
    """diffusers' configuration has no name then, T5's has an empty one."""
    text = T5EncoderModel(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=1))
    for part, model in (("vae", AutoencoderKL()), ("text_encoder", text)):
        assert lora.stored_dtype(model.bfloat16(), part) == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_begins_as_the_base_trains_and_loads_bit_for_bit(tmp_path, tiny_pixart, dtype):
    """On Linear and Conv2d, under autocast as in training; PEFT alone starts up to 0.4 % off on a bf16 base."""
    plain = images(pretrained.load(tiny_pixart, dtype, CPU))
    model = pretrained.load(tiny_pixart, dtype, CPU)
    for part, targets in PARTS.items():
        setattr(
            model, part, lora_layers.attach(getattr(model, part), targets, 4, base=str(tiny_pixart), use_dora=True)
        )
    assert torch.equal(images(model), plain)
    parameters = [*lora_layers.trainable_parameters(model.transformer)]
    assert {p.dtype for p in parameters} == {torch.float32}
    magnitudes = {name: p for name, p in model.transformer.named_parameters() if "magnitude" in name}
    assert len(magnitudes) == 27 and any(p.ndim == 4 for p in magnitudes.values())
    before = {name: p.detach().clone() for name, p in magnitudes.items()}
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            text = torch.ones(2, 8, 16).to(dtype), torch.tensor([10, 500])
            conditions = {"resolution": None, "aspect_ratio": None}
            noisy = torch.arange(2 * 4 * 4 * 4).reshape(2, 4, 4, 4).to(dtype) / 64
            prediction = model.transformer(noisy, *text, conditions, encoder_attention_mask=torch.ones(2, 8)).sample
        (prediction.float() - 1).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(p, before[name]) for name, p in magnitudes.items())
    for part in PARTS:
        lora_layers.save(getattr(model, part), tmp_path / f"{part}_lora")
    lora.export(tmp_path, tmp_path / lora.FILE_NAME)
    expected = images(model)
    assert torch.equal(images(adapted_by_peft(tiny_pixart, tmp_path, dtype)), expected)
    for source in (tmp_path, tmp_path / lora.FILE_NAME):
        pipeline = stock(tiny_pixart, dtype)
        lora.load(pipeline, source)
        assert torch.equal(images(parts(pipeline)), expected)
    names = load_file(tmp_path / lora.FILE_NAME).keys()
    assert "transformer.proj_out.lora_magnitude_vector.weight" in names  # OneTrainer and PEFT both read this name
    with pytest.raises(UserError, match="ComfyUI reads otherwise"):
        lora.export(tmp_path, tmp_path / "x.safetensors", "comfyui")
    with pytest.raises(UserError, match="no strength"):
        lora.load(stock(tiny_pixart), tmp_path, scale=0.5)


def test_damaged_foreign_and_misplaced_loras_are_named(run, tmp_path, tiny_pixart):
    file = tmp_path / "x.safetensors"
    pipeline = stock(tiny_pixart)
    with pytest.raises(UserError, match="no LoRA in"):
        lora.load(pipeline, file)
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="cannot read"):
        lora.load(pipeline, file)
    save_file({"unet.conv_in.lora_A.weight": torch.ones(1)}, file)
    with pytest.raises(UserError, match=r"it has a tensor unet\.conv_in"):
        lora.load(pipeline, file)
    lora.export(run, file)
    tensors = load_file(file)
    for change in (
        {"transformer.proj_out.lora_A.weight": torch.ones(4, 3)},  # another width
        {"transformer.gone.lora_A.weight": torch.ones(4, 3)},  # a layer that is not there
    ):
        save_file(tensors | change, file)
        with pytest.raises(UserError, match="does not belong to this transformer"):
            lora.load(stock(tiny_pixart), file)
    save_file(tensors | {"transformer.proj_out.lora_A.weight": torch.ones(3, 16)}, file)
    with pytest.raises(UserError, match=r"ranks \[3, 4\]"):
        lora.load(pipeline, file)
    lora.load(pipeline, run)
    with pytest.raises(UserError, match="has a LoRA already"):
        lora.load(pipeline, run)
