"""The published model without its weights: exact shapes, sane random numbers; and, marked slow, a run of medart.py."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_grad import decode_latents, sample_latents
from medart_core import devices, full_size, latents, lora_layers, trainable
from medart_core.objectives import color_distribution_loss
from medart_core.sampling import initial_noise
from medart_core.text import encode_with_negative

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
PARTS = ("text_encoder", "vae", "transformer")
# The published architecture, thinner and shallower: seconds instead of minutes.
SMALL = {
    "text_encoder": {"d_model": 64, "d_kv": 64, "d_ff": 160, "num_layers": 3, "num_heads": 2},
    "vae": {"block_out_channels": (16, 16, 32, 32), "norm_num_groups": 8},
    "transformer": {"num_attention_heads": 2, "num_layers": 4, "cross_attention_dim": 144, "caption_channels": 64},
}


@pytest.fixture
def small(monkeypatch):
    shapes = {part: full_size.SHAPES[part] | SMALL[part] for part in PARTS}
    monkeypatch.setattr(full_size, "SHAPES", shapes)


def test_parameter_counts_are_the_published_ones():
    models = full_size.build_empty()
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [4_762_310_656, 83_653_863, 610_856_096]
    text_encoder, vae, transformer = models
    assert text_encoder.encoder.block[0].layer[1].DenseReluDense.wi_1.out_features == 10240
    assert vae.config["scaling_factor"] == 0.18215
    config = transformer.config
    assert (config["sample_size"], config["in_channels"], config["out_channels"]) == (64, 4, 8)
    assert {p.device.type for model in models for p in model.parameters()} == {"meta"}


def test_the_solver_is_the_published_one():
    """As published with the model, in the fields that diffusers 0.22 knew."""
    from diffusers import DPMSolverMultistepScheduler

    published = {
        "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
        "algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "prediction_type": "epsilon",
        "lower_order_final": True, "euler_at_final": False, "thresholding": False, "timestep_spacing": "linspace",
        "steps_offset": 0, "use_karras_sigmas": False, "use_lu_lambdas": False, "variance_type": None,
    }  # fmt: skip
    config = DPMSolverMultistepScheduler(**full_size.SCHEDULER).config
    assert {name: config[name] for name in published} == published


def test_random_weights_follow_from_the_seed(small):
    a, b, other = (full_size.build_random(torch.bfloat16, CPU, seed) for seed in (1, 1, 2))
    for part in PARTS:
        states = [dict(getattr(model, part).named_parameters()) for model in (a, b, other)]
        assert {(p.dtype, p.device.type, p.requires_grad) for p in states[0].values()} == {
            (torch.bfloat16, "cpu", False)
        }
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        drawn = [name for name, p in states[0].items() if p.dim() > 1]
        assert all(not torch.equal(states[0][name], states[2][name]) for name in drawn)
    assert a.text_encoder.shared.weight is a.text_encoder.encoder.embed_tokens.weight
    assert a.image_size == 512 and a.name == full_size.NAME


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_dtype_and_quantisation_only_round_the_base(small, quantize):
    exact = full_size.build_random(torch.float32, CPU)
    rounded = full_size.build_random(torch.bfloat16, CPU, quantize=quantize)
    for part in PARTS if quantize is None else ("vae", "transformer"):
        expected = getattr(exact, part).bfloat16().state_dict()
        assert all(torch.equal(expected[name], p) for name, p in getattr(rounded, part).state_dict().items())


def test_a_run_of_any_seed_trains_on_the_base_that_is_sampled(small):
    unset = (
        "pretrained_model_name_or_path",
        "revision",
        "variant",
        "cache_dir",
        "text_encoder_quantization",
        "lora_alpha",
    )
    off = ("use_dora", "use_rslora", "no_text_encoder_lora", "gradient_checkpointing")
    options: Any = dict.fromkeys(unset) | dict.fromkeys(off, False)
    trained = trainable.build(torch.float32, CPU, **options, random_weights=True, rank=2, seed=7)
    base = full_size.build_random(torch.float32, CPU)
    assert torch.equal(
        trained.transformer.base_model.model.proj_out.base_layer.weight, base.transformer.proj_out.weight
    )


def test_the_table_of_positions_is_the_real_one(small):
    from diffusers import PixArtTransformer2DModel

    built = full_size.build_random(torch.float32, CPU).transformer
    stock: Any = PixArtTransformer2DModel(**full_size.SHAPES["transformer"])
    assert torch.equal(built.pos_embed.pos_embed, stock.pos_embed.pos_embed)


def spread(values: torch.Tensor) -> float:
    assert values.isfinite().all()
    return values.float().std().item()


@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
def test_activations_and_colour_gradients_are_finite_in_bf16(small, quantize):
    model = full_size.build_random(torch.bfloat16, CPU, quantize=quantize)
    linear = [type(m).__name__ for m in model.text_encoder.modules() if isinstance(m, torch.nn.Linear)]
    assert set(linear) == {{"int8": "Linear8bitLt", "nf4": "Linear4bit", None: "Linear"}[quantize]}
    model.transformer = lora_layers.attach(model.transformer, lora_layers.TRANSFORMER_TARGETS, rank=2)
    model.text_encoder = lora_layers.attach(model.text_encoder, lora_layers.TEXT_ENCODER_TARGETS, rank=2)
    with torch.autocast("cpu", torch.bfloat16):
        text = encode_with_negative(model.tokenizer, model.text_encoder, ["a chest x-ray image", "hazy"])
        assert 0.1 < spread(text[0]) < 10 and spread(text[0][0, 0] - text[0][1, 0]) > 0.01
        moments = latents.encode_moments(model.vae, torch.randn(1, 3, 64, 64))
        assert 0.001 < spread(moments[:, 0]) < 100
        noise = initial_noise([0, 1], 4, 8, 8)
        sampled = sample_latents(model.transformer, model.scheduler, noise, *text, num_inference_steps=20,
                                 gradient="full", checkpoint_steps=True)  # fmt: skip
        assert (
            0.1 < spread(sampled) < 1000
        )  # about 157 = 1 / alpha_T: almost no noise is predicted, none is taken away
        pixels = decode_latents(model.vae, sampled)
    assert spread(pixels) > 0.01
    color_distribution_loss(pixels, torch.zeros_like(pixels)).backward()
    for part in (model.transformer, model.text_encoder):
        gradient = lora_layers.gradients(list(lora_layers.trainable_parameters(part)))
        assert gradient.isfinite().all() and gradient.norm() > 0


def peak_rss_gb(arguments: list[str]) -> tuple[subprocess.CompletedProcess, float]:
    """Run Python with `arguments`; its peak resident memory is that of the largest child that ended so far."""
    import resource

    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)
    return done, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9


@pytest.mark.parametrize("shapes", ["small", pytest.param("published", marks=pytest.mark.slow)])
def test_one_ordinary_and_one_hldf_step_on_the_cpu(shapes, x_rays, tmp_path):
    """medart.py in bf16 with gradient checkpointing; the published shapes have to fit 24 GB. Prints time and peak."""
    thinner = f"[f.SHAPES[part].update(shape) for part, shape in {SMALL!r}.items()]; " if shapes == "small" else ""
    call = "runpy.run_path('medart.py', run_name='__main__')"
    start = f"import runpy; from medart_core import full_size as f; {thinner}{call}"
    flags = [
        "--random_weights", f"--dataset_name={x_rays}", f"--resolution={512 if shapes == 'published' else 64}",
        "--gradient_checkpointing", "--mixed_precision=bf16", "--use_8bit_adam", "--M_times=2", "--N_steps=2",
        "--max_train_steps=2", "--num_validation_images=0", "--report_to=none",
        "--logging_steps=1", f"--output_dir={tmp_path / 'out'}",
    ]  # fmt: skip
    done, peak_gb = peak_rss_gb(["-c", start, *flags])
    assert done.returncode == 0, done.stderr[-2000:]
    hldf, ordinary = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert "loss_color" in hldf and "loss_color" not in ordinary
    record = {
        "shapes": shapes, "M": 2, "bf16_native": devices.bf16_is_native(CPU), "peak_rss_gb": round(peak_gb, 2),
        "sec_per_step": ordinary["sec_per_step"], "sec_per_hldf_step": hldf["sec_per_hldf_step"],
    }  # fmt: skip
    print(json.dumps(record))
    assert peak_gb < 24
