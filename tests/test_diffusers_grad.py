"""The differentiable sampler against the official pipeline, hand-written solver formulas and plain arithmetic."""

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import diffusers
import peft
import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from torch import Tensor, nn

import diffusers_grad
from diffusers_grad import GRADIENT_MODES, attention, decode_latents, sample_latents, sampler

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in set_timesteps
BATCH, TOKENS, CAPTION_CHANNELS, SIDE = 2, 5, 16, 8


class Inputs(NamedTuple):
    latents: Tensor
    prompt_embeds: Tensor
    prompt_attention_mask: Tensor
    negative_prompt_embeds: Tensor
    negative_prompt_attention_mask: Tensor


def make_inputs(seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(2, BATCH, TOKENS, CAPTION_CHANNELS, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    negative_mask = torch.tensor([[1, 0, 0, 0, 0]] * BATCH)
    latents = torch.randn(BATCH, 4, SIDE, SIDE, generator=generator)
    return Inputs(latents, embeds[0], mask, embeds[1], negative_mask)


def make_scheduler(**changes: Any) -> DPMSolverMultistepScheduler:
    """PixArt's own settings: linear betas, 2M, midpoint, last step to sigma = 0."""
    return DPMSolverMultistepScheduler(**{"beta_start": 0.0001, "beta_end": 0.02, "solver_order": 2} | changes)


def make_transformer(**changes: Any) -> Any:  # diffusers' annotations of `to` and `__init__` are too narrow to use
    torch.manual_seed(1)
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "cross_attention_dim": 24,
        "num_layers": 2,
        "sample_size": SIDE,
        "caption_channels": CAPTION_CHANNELS,
    }
    transformer = PixArtTransformer2DModel(**(config | changes))
    for parameter in transformer.parameters():  # no gate, bias or projection may start at zero
        nn.init.normal_(parameter, std=0.15)
    return transformer.eval()


def make_vae() -> Any:
    torch.manual_seed(2)
    blocks = 4
    config: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        "block_out_channels": (4,) * blocks,
        "norm_num_groups": 2,
        "latent_channels": 4,
    }
    return AutoencoderKL(**config).eval()


def make_pipeline(transformer: PixArtTransformer2DModel) -> Any:
    nothing = cast(Any, None)
    pipeline = PixArtAlphaPipeline(
        tokenizer=nothing, text_encoder=nothing, vae=make_vae(), transformer=transformer, scheduler=make_scheduler()
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def predict(transformer: Any, inputs: Inputs) -> torch.Tensor:
    """The transformer's output by itself, at two timesteps."""
    return transformer(
        inputs.latents,
        encoder_hidden_states=inputs.prompt_embeds,
        encoder_attention_mask=inputs.prompt_attention_mask,
        timestep=torch.tensor([500, 20]),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample


def official_arguments(inputs: Inputs, steps: int, guidance_scale: float) -> dict[str, Any]:
    return inputs._asdict() | {
        "negative_prompt": None,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "output_type": "latent",
        "use_resolution_binning": False,
        "height": 8 * SIDE,
        "width": 8 * SIDE,
        "return_dict": False,
    }


def gradients(module: nn.Module, result: Tensor) -> dict[str, Tensor]:
    """The gradient of a fixed random projection of `result`, for every trainable parameter."""
    projection = torch.randn(result.shape, generator=torch.Generator().manual_seed(3))
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return dict(
        zip(trainable, torch.autograd.grad((result * projection).sum(), list(trainable.values())), strict=True)
    )


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        if name.endswith("to_k.bias"):
            continue  # zero but for rounding: it shifts all scores of a softmax alike
        assert gradient.abs().max() > 0, name
        error = (actual[name] - gradient).norm() / gradient.norm()
        assert error <= rtol, f"{name}: relative error {error:.1e}"


def test_the_checkout_is_tested_and_the_official_package_is_not_shadowed() -> None:
    assert Path(cast(str, diffusers_grad.__file__)).resolve().is_relative_to(ROOT / "diffusers")
    # .venv may lie in the checkout, so only the folder of the same name is asked for.
    assert not Path(cast(str, diffusers.__file__)).resolve().is_relative_to(ROOT / "diffusers")
    assert list((ROOT / "diffusers").glob("*.py")) == []


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize("steps", [2, 5, 14, 20])
def test_latents_equal_the_official_pipeline(steps: int, guidance_scale: float) -> None:
    inputs, transformer = make_inputs(), make_transformer()
    pipeline = make_pipeline(transformer)
    expected = pipeline(**official_arguments(inputs, steps, guidance_scale))[0]
    actual = sample_latents(
        transformer, make_scheduler(), *inputs, num_inference_steps=steps, guidance_scale=guidance_scale
    )
    assert expected.std() > 0.1 and expected.isfinite().all()
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def test_the_1024_checkpoint_is_told_the_image_size() -> None:
    inputs, transformer = make_inputs(), make_transformer(sample_size=128)
    expected = make_pipeline(transformer)(**official_arguments(inputs, 3, 4.5))[0]
    actual = sample_latents(transformer, make_scheduler(), *inputs, num_inference_steps=3)
    assert torch.equal(actual, expected)


def test_guidance_can_be_switched_off_without_a_negative_prompt() -> None:
    inputs, transformer = make_inputs(), make_transformer()
    positive, nothing = inputs[:3], (None, None)
    expected = sample_latents(transformer, make_scheduler(), *inputs, num_inference_steps=3, guidance_scale=1.0)
    actual = sample_latents(
        transformer, make_scheduler(), *positive, *nothing, num_inference_steps=3, guidance_scale=1.0
    )
    assert torch.equal(actual, expected)
    with pytest.raises(ValueError, match="negative_prompt_embeds"):
        sample_latents(transformer, make_scheduler(), *positive, *nothing, num_inference_steps=3)


@pytest.mark.parametrize(("steps", "guidance_scale"), [(4, 4.5), (5, 1.0), (20, 4.5)])
def test_full_gradient_equals_the_unwrapped_official_call(steps: int, guidance_scale: float) -> None:
    inputs, transformer = make_inputs(), make_transformer()
    unwrapped = cast(Any, PixArtAlphaPipeline.__call__).__wrapped__  # the call without its torch.no_grad
    pipeline = make_pipeline(transformer)
    expected = unwrapped(pipeline, **official_arguments(inputs, steps, guidance_scale))[0]
    actual = sample_latents(
        transformer,
        make_scheduler(),
        *inputs,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        gradient="full",
        checkpoint_steps=True,
    )
    assert_same_gradients(gradients(transformer, actual), gradients(transformer, expected), rtol=1e-5)


def rollout_with_gradients(
    transformer: PixArtTransformer2DModel, gradient: str, *, steps: bool, blocks: bool, autocast: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    if blocks:
        transformer.enable_gradient_checkpointing()
    else:
        transformer.disable_gradient_checkpointing()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        latents = sample_latents(
            transformer,
            make_scheduler(),
            *make_inputs(),
            num_inference_steps=5,
            gradient=gradient,
            k=2,
            checkpoint_steps=steps,
            generator=torch.Generator().manual_seed(0),
        )
    return latents.detach(), gradients(transformer, latents)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("gradient", ["full", "last_k", "sparse", "one_step"])
def test_checkpointing_changes_neither_latents_nor_gradient(gradient: str, autocast: bool) -> None:
    transformer = make_transformer()
    expected, expected_gradients = rollout_with_gradients(
        transformer, gradient, steps=False, blocks=False, autocast=autocast
    )
    for steps, blocks in ((True, False), (False, True), (True, True)):
        actual, actual_gradients = rollout_with_gradients(
            transformer, gradient, steps=steps, blocks=blocks, autocast=autocast
        )
        assert torch.equal(actual, expected)
        assert_same_gradients(actual_gradients, expected_gradients, rtol=1e-6)


def test_checkpointing_replays_dropout() -> None:
    transformer = make_transformer(dropout=0.3).train()
    results = []
    for checkpoint_steps in (False, True):
        torch.manual_seed(5)
        latents = sample_latents(
            transformer,
            make_scheduler(),
            *make_inputs(),
            num_inference_steps=3,
            gradient="full",
            checkpoint_steps=checkpoint_steps,
        )
        torch.manual_seed(6)  # what happens between forward and backward must not matter
        results.append((latents.detach(), gradients(transformer, latents)))
    assert torch.equal(results[0][0], results[1][0])
    assert_same_gradients(results[1][1], results[0][1], rtol=1e-6)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_fp32_adapters_on_a_bf16_base_learn_through_the_last_steps(autocast: bool) -> None:
    """Latents stay fp32, and the steps without a graph do not rob the adapters of their gradient."""
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    transformer = peft.get_peft_model(make_transformer().to(torch.bfloat16), config)
    inputs = make_inputs()
    inputs.prompt_embeds.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        latents = sample_latents(
            transformer,
            make_scheduler(),
            *inputs,
            num_inference_steps=4,
            gradient="last_k",
            k=1,
            checkpoint_steps=True,
        )
    assert latents.dtype == torch.float32
    latents.square().sum().backward()
    adapters = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    assert adapters and all(p.dtype == torch.float32 and "lora_" in name for name, p in adapters.items())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapters.values())
    assert inputs.prompt_embeds.grad is not None and inputs.prompt_embeds.grad.abs().max() > 0


# The prompt's keys and values, computed once.


@pytest.mark.parametrize("gradient", ["full", "last_k", "one_step"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
def test_a_prompt_read_once_gives_what_a_prompt_read_in_each_step_gives(
    gradient: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = peft.LoraConfig(r=2, target_modules=["to_k", "to_v", "linear_1"], init_lora_weights=False)
    base = make_transformer()
    transformer = peft.get_peft_model(base, config)
    results = []
    for once in (True, False):
        if not once:
            monkeypatch.setattr(sampler, "prompt_arguments", lambda _, embeds: {"encoder_hidden_states": embeds})
        inputs = make_inputs()
        inputs.prompt_embeds.requires_grad_(True)
        inputs.negative_prompt_embeds.requires_grad_(True)
        if checkpointing:
            base.enable_gradient_checkpointing()
        calls: list[object] = []
        to_k = base.transformer_blocks[0].attn2.to_k
        handle = to_k.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        latents = sample_latents(
            transformer,
            make_scheduler(),
            *inputs,
            num_inference_steps=4,
            gradient=gradient,
            k=2,
            checkpoint_steps=checkpointing,
            generator=torch.Generator().manual_seed(0),
        )
        embeds = [inputs.prompt_embeds, inputs.negative_prompt_embeds]
        read = torch.autograd.grad(latents.square().sum(), embeds, retain_graph=True)
        handle.remove()
        results.append(
            (latents.detach(), gradients(transformer, latents) | {"positive": read[0], "negative": read[1]})
        )
    assert torch.equal(results[0][0], results[1][0])
    assert_same_gradients(results[0][1], results[1][1], rtol=1e-5)


def test_after_a_rollout_the_transformer_reads_plain_embeddings_as_before() -> None:
    transformer, inputs = make_transformer(), make_inputs()
    names = list(transformer.state_dict())
    before = predict(transformer, inputs)
    sample_latents(transformer, make_scheduler(), *inputs, num_inference_steps=2)
    assert torch.equal(predict(transformer, inputs), before)
    transformer.enable_gradient_checkpointing()  # which passes the blocks' arguments without their names
    assert torch.equal(predict(transformer, inputs), before)
    assert list(transformer.state_dict()) == names


def test_compiled_blocks_serve_the_rollout_with_one_graph_for_all() -> None:
    transformer, inputs = make_transformer(num_layers=3), make_inputs()
    expected = sample_latents(transformer, make_scheduler(), *inputs, num_inference_steps=3)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in transformer.transformer_blocks[1:]:
        block.compile(backend="eager")
    for _ in range(2):
        actual = sample_latents(transformer, make_scheduler(), *inputs, num_inference_steps=3)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# Attention.


def attention_inputs(queries: int, keys: int, dtype: torch.dtype, width: int = 12) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, width, generator=generator) for n in (queries, keys, keys))
    mask = torch.zeros(2, 1, 1, keys).index_fill_(3, torch.arange(keys - 2, keys), -10000.0)
    return *(tensor.to(dtype).requires_grad_() for tensor in (query, key, value)), mask.to(dtype)


@pytest.mark.parametrize("masked", [False, True])
def test_plain_products_in_bf16_are_the_fused_kernels_up_to_rounding(masked: bool) -> None:
    query, key, value, mask = attention_inputs(9, 7, torch.bfloat16)
    bias = mask if masked else None
    exact = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    expected = nn.functional.scaled_dot_product_attention(*exact, attn_mask=None if bias is None else bias.double())
    actual = attention.attend(query, key, value, None if bias is None else bias.float())
    assert actual.dtype == torch.bfloat16
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    results = [torch.autograd.grad((out * weights).sum(), inputs) for out, inputs in (
        (expected, exact), (actual, (query, key, value)))]  # fmt: skip
    for reference, mine in zip((expected, *results[0]), (actual, *results[1]), strict=True):
        assert (mine - reference).norm() <= 0.01 * reference.norm()
    if masked:
        assert results[1][2][:, :, -2:].abs().max() == 0  # what is masked is not read


@pytest.mark.parametrize(("keys", "dtype"), [(7, torch.float32), (attention.KEPT_SCORES // 8, torch.bfloat16)])
def test_in_fp32_and_for_long_sequences_the_fused_kernel_stays(keys: int, dtype: torch.dtype) -> None:
    query, key, value, mask = attention_inputs(9, keys, dtype, width=2)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert torch.equal(attention.attend(query, key, value, mask), expected)


def test_installed_attention_gives_a_training_step_the_stock_result() -> None:
    transformer, inputs = make_transformer(), make_inputs()
    names = list(transformer.state_dict())
    expected = predict(transformer, inputs)
    expected_gradients = gradients(transformer, expected)
    attention.install(transformer)
    assert list(transformer.state_dict()) == names
    processors = list(transformer.attn_processors.values())
    assert len(processors) == 4 and all(isinstance(each, attention.PixArtProcessor) for each in processors)
    actual = predict(transformer, inputs)
    assert torch.equal(actual, expected)
    assert_same_gradients(gradients(transformer, actual), expected_gradients, rtol=1e-6)


# A linear denoiser, and DPM-Solver++(2M) written from the paper in float64.


class LinearDenoiser(nn.Module):
    """eps = a x + b mean(text) + c t / 1000, with a second half of channels that must be ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.tensor(value)) for value in (0.8, 0.3, 0.1))
        self.config = {"sample_size": SIDE}

    def eps(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        per_image = self.b * text.to(x).mean(dim=(1, 2)) + self.c * t.to(x) / 1000
        return self.a.to(x) * x + per_image[:, None, None, None]

    def forward(
        self, hidden_states: Tensor, *, encoder_hidden_states: Tensor, timestep: Tensor, **_: object
    ) -> tuple[Tensor]:
        eps = self.eps(hidden_states, encoder_hidden_states, timestep)
        return (torch.cat([eps, 1e3 * torch.ones_like(eps)], dim=1),)


class Trajectory(NamedTuple):
    x: list[Tensor]  # x_{t_0}, ..., x_{t_M}
    x0: list[Tensor]  # the data prediction of each step
    alpha: Tensor
    sigma: Tensor
    times: list[int]


def solve(x: Tensor, eps: Callable[[int, Tensor, int], Tensor], steps: int) -> Trajectory:
    """DPM-Solver++(2M), arXiv 2211.01095 algorithm 2, from t = 999 over evenly spaced times to sigma = 0.

    The first step has no history and the last no finite lambda, so both are of first order (equation 8 with k = 1).
    """
    alphas_cumprod = make_scheduler().alphas_cumprod.double()
    times = [round(999 * (steps - i) / steps) for i in range(steps)]
    alpha = torch.cat([alphas_cumprod[times].sqrt(), torch.ones(1, dtype=torch.float64)])
    sigma = torch.cat([(1 - alphas_cumprod[times]).sqrt(), torch.zeros(1, dtype=torch.float64)])
    lam = (alpha / sigma).log()
    trajectory = Trajectory([x], [], alpha, sigma, times)
    for i in range(steps):
        trajectory.x0.append((x - sigma[i] * eps(i, x, times[i])) / alpha[i])
        data = trajectory.x0[i]
        h = lam[i + 1] - lam[i]
        if 0 < i < steps - 1:
            r = (lam[i] - lam[i - 1]) / h
            data = (1 + 1 / (2 * r)) * trajectory.x0[i] - 1 / (2 * r) * trajectory.x0[i - 1]
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * torch.expm1(-h) * data
        trajectory.x.append(x)
    return trajectory


GUIDANCE = 2.5


def guided_eps(model: LinearDenoiser, inputs: Inputs) -> Callable[[int, Tensor, int], Tensor]:
    def eps(_: int, x: Tensor, t: int) -> Tensor:
        time = torch.tensor(t)
        positive, negative = (
            model.eps(x, text, time) for text in (inputs.prompt_embeds, inputs.negative_prompt_embeds)
        )
        return GUIDANCE * positive + (1 - GUIDANCE) * negative

    return eps


def reference(
    model: LinearDenoiser, inputs: Inputs, gradient: str, steps: int, k: int, chosen: int = -1
) -> tuple[Tensor, Tensor]:
    """The result of a mode, and a float64 tensor with the same gradient by another road."""
    eps = guided_eps(model, inputs)
    noise = inputs.latents.double()
    with torch.no_grad():
        fixed = solve(noise, eps, steps)
    if gradient == "full":
        return fixed.x[-1], solve(noise, eps, steps).x[-1]
    if gradient == "last_k":

        def replayed(i: int, x: Tensor, t: int) -> Tensor:
            return eps(i, x, t) if i >= steps - k else eps(i, fixed.x[i], t).detach()

        return fixed.x[-1], solve(noise, replayed, steps).x[-1]
    if gradient == "one_step":
        x, alpha, sigma = fixed.x[chosen], fixed.alpha[chosen], fixed.sigma[chosen]
        return fixed.x0[chosen], (x - sigma * eps(chosen, x, fixed.times[chosen])) / alpha
    # sparse: dx_M / d eps_i by autograd on scalars, then the weighted sum of the graph steps, written out.
    scalars = torch.zeros(steps, dtype=torch.float64, requires_grad=True)
    end = solve(torch.zeros((), dtype=torch.float64), lambda i, _x, _t: scalars[i], steps).x[-1]
    (weights,) = torch.autograd.grad(end, scalars)
    kept = list(range(0, steps, k))
    scale = weights.abs().sum() / weights[kept].abs().sum()
    terms = [scale * weights[i] * eps(i, fixed.x[i], fixed.times[i]) for i in kept]
    return fixed.x[-1], torch.stack(terms).sum(0)


def sample_linear(
    model: LinearDenoiser, inputs: Inputs, gradient: str, steps: int, k: int = 1, seed: int = 0
) -> Tensor:
    return sample_latents(
        model,
        make_scheduler(),
        *inputs,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        gradient=gradient,
        k=k,
        generator=torch.Generator().manual_seed(seed),
    )


@pytest.mark.parametrize("steps", [6, 7, 20])
@pytest.mark.parametrize(
    ("gradient", "k"), [("full", 1), ("last_k", 1), ("last_k", 3), ("last_k", 6), ("sparse", 1), ("sparse", 3)]
)
def test_modes_equal_the_hand_written_solver(gradient: str, k: int, steps: int) -> None:
    model, inputs = LinearDenoiser(), make_inputs()
    actual = sample_linear(model, inputs, gradient, steps, k)
    value, surrogate = reference(model, inputs, gradient, steps, k)
    torch.testing.assert_close(actual.double(), value, rtol=1e-4, atol=1e-4 * value.abs().max().item())
    assert_same_gradients(gradients(model, actual), gradients(model, surrogate), rtol=1e-4)


def test_the_modes_differ_from_each_other() -> None:
    """Else the comparisons above could not tell one mode from another."""
    model, inputs = LinearDenoiser(), make_inputs()
    modes = [("full", 1), ("last_k", 1), ("last_k", 3), ("sparse", 1), ("sparse", 3)]
    results = [sample_linear(model, inputs, gradient, 6, k) for gradient, k in modes]
    slopes = torch.stack([gradients(model, result)["a"] for result in results])
    distances = (slopes[:, None] - slopes).abs() / slopes.abs()
    assert distances[~torch.eye(len(modes), dtype=torch.bool)].min() > 1e-2


def test_one_step_returns_the_x0_estimate_of_a_random_step() -> None:
    steps = 4
    model, inputs = LinearDenoiser(), make_inputs()
    references = [reference(model, inputs, "one_step", steps, 1, chosen) for chosen in range(steps)]
    drawn = set()
    for seed in range(20):
        actual = sample_linear(model, inputs, "one_step", steps, seed=seed)
        errors = torch.stack([(actual - value).norm() / value.norm() for value, _ in references])
        chosen = int(errors.argmin())
        assert errors[chosen] < 1e-4 and errors.sort().values[1] > 1e-2
        assert torch.equal(actual, sample_linear(model, inputs, "one_step", steps, seed=seed))
        if chosen not in drawn:
            expected = gradients(model, references[chosen][1])
            assert_same_gradients(gradients(model, actual), expected, rtol=1e-4)
        drawn.add(chosen)
    assert drawn == set(range(steps))


def test_noise_has_a_gradient_in_full_only() -> None:
    model, inputs = LinearDenoiser(), make_inputs()
    noise = inputs.latents.clone().requires_grad_(True)
    inputs = inputs._replace(latents=noise)
    _, surrogate = reference(model, inputs, "full", 6, 1)
    (expected,) = torch.autograd.grad(surrogate.sum(), noise)
    (actual,) = torch.autograd.grad(sample_linear(model, inputs, "full", 6).sum(), noise)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    for gradient in ("last_k", "sparse", "one_step"):
        latents = sample_linear(model, inputs, gradient, 6, k=2)
        assert torch.autograd.grad(latents.sum(), noise, allow_unused=True) == (None,), gradient


@pytest.mark.parametrize("gradient", ["full", "last_k", "sparse", "one_step"])
def test_one_inference_step_is_one_first_order_step(gradient: str) -> None:
    """M = 1 goes from t = 999 to sigma = 0, where equation 8 of 2211.01095 leaves x_0 = (x - sigma eps) / alpha."""
    model, inputs = LinearDenoiser(), make_inputs()
    alpha_cumprod = make_scheduler().alphas_cumprod[999].double()
    x = inputs.latents.double()
    expected = (x - (1 - alpha_cumprod).sqrt() * guided_eps(model, inputs)(0, x, 999)) / alpha_cumprod.sqrt()
    actual = sample_linear(model, inputs, gradient, 1)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-3)
    assert_same_gradients(gradients(model, actual), gradients(model, expected), rtol=1e-4)


def test_backward_through_none_raises() -> None:
    latents = sample_linear(LinearDenoiser(), make_inputs(), "none", 3)
    assert not latents.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        latents.sum().backward()


def test_a_surrounding_no_grad_is_respected() -> None:
    model, inputs = LinearDenoiser(), make_inputs()
    with torch.no_grad():
        assert not any(sample_linear(model, inputs, gradient, 3).requires_grad for gradient in GRADIENT_MODES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient": "last"}, "choose one of full, last_k, sparse, one_step, none"),
        ({"gradient": "last_k", "k": 0}, "needs 1 <= k <= num_inference_steps = 4"),
        ({"gradient": "last_k", "k": 5}, "needs 1 <= k <= num_inference_steps = 4"),
        ({"gradient": "sparse", "k": 5}, "needs 1 <= k <= num_inference_steps = 4"),
        ({"num_inference_steps": 0}, "must be 1 or more"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments: dict[str, Any] = {"num_inference_steps": 4} | changes
        sample_latents(LinearDenoiser(), make_scheduler(), *make_inputs(), **arguments)


def test_k_is_ignored_where_it_has_no_meaning() -> None:
    for gradient in ("full", "one_step", "none"):
        sample_linear(LinearDenoiser(), make_inputs(), gradient, 2, k=5)


@pytest.mark.parametrize("changes", [{"algorithm_type": "sde-dpmsolver++"}, {"thresholding": True}])
def test_other_solvers_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="use DPMSolverMultistepScheduler"):
        sample_latents(LinearDenoiser(), make_scheduler(**changes), *make_inputs(), num_inference_steps=2)


def saved_bytes(steps: int, *, nested: bool) -> int:
    """Bytes that a rollout hands to autograd to keep for the backward pass."""
    transformer = make_transformer()
    if nested:
        transformer.enable_gradient_checkpointing()
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        latents = sample_latents(
            transformer,
            make_scheduler(),
            *make_inputs(),
            num_inference_steps=steps,
            gradient="full",
            checkpoint_steps=nested,
        )
    assert latents.requires_grad
    return total


def test_memory_is_flat_in_the_number_of_steps() -> None:
    latent_bytes = make_inputs().latents.nbytes
    growth = saved_bytes(16, nested=True) - saved_bytes(4, nested=True)
    scalars = 12 * 128
    assert 12 * latent_bytes <= growth <= 12 * latent_bytes + scalars
    plain_growth = saved_bytes(16, nested=False) - saved_bytes(4, nested=False)
    assert plain_growth > 50 * growth


@pytest.mark.skipif(not torch.cuda.is_available(), reason="peak memory is measured on CUDA")
def test_peak_memory_on_cuda_is_flat_in_the_number_of_steps() -> None:
    transformer = make_transformer(num_attention_heads=8, attention_head_dim=64, cross_attention_dim=512).cuda()
    transformer.enable_gradient_checkpointing()
    inputs = Inputs(*(tensor.cuda() for tensor in make_inputs()))

    def peak(steps: int) -> int:
        transformer.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        latents = sample_latents(
            transformer,
            make_scheduler(),
            *inputs,
            num_inference_steps=steps,
            gradient="full",
            checkpoint_steps=True,
        )
        latents.sum().backward()
        return torch.cuda.max_memory_allocated()

    peak(4)  # the first run also allocates the libraries' workspaces
    assert peak(16) - peak(4) <= 12 * inputs.latents.nbytes + 2**20


class Sentinel:
    """Dies with the graph that holds it."""


class HoldSentinel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sentinel: Sentinel) -> Tensor:
        ctx.sentinel = sentinel
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class WatchedDenoiser(LinearDenoiser):
    def __init__(self) -> None:
        super().__init__()
        self.sentinels: list[weakref.ref[Sentinel]] = []

    def eps(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        sentinel = Sentinel()
        self.sentinels.append(weakref.ref(sentinel))
        return cast(Tensor, HoldSentinel.apply(super().eps(x, text, t), sentinel))


@pytest.mark.parametrize("checkpoint_steps", [False, True])
@pytest.mark.parametrize("gradient", ["full", "last_k", "sparse", "one_step"])
def test_callers_scheduler_is_untouched_and_no_graph_stays_alive(gradient: str, checkpoint_steps: bool) -> None:
    scheduler, model = make_scheduler(), WatchedDenoiser()
    scheduler.set_timesteps(7)
    before = copy.deepcopy(vars(scheduler))
    latents = sample_latents(
        model,
        scheduler,
        *make_inputs(),
        num_inference_steps=4,
        gradient=gradient,
        k=2,
        checkpoint_steps=checkpoint_steps,
    )
    alive = sum(sentinel() is not None for sentinel in model.sentinels)
    assert alive == {"full": 4, "last_k": 2, "sparse": 2, "one_step": 1}[gradient]
    latents.sum().backward()
    del latents
    gc.collect()
    assert model.sentinels and all(sentinel() is None for sentinel in model.sentinels)
    after = vars(scheduler)
    assert after.keys() == before.keys()
    for name, value in before.items():
        same = torch.equal(after[name], value) if isinstance(value, Tensor) else after[name] == value
        assert same, name


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_decoding_equals_the_vae_with_and_without_checkpointing(autocast: bool) -> None:
    vae, latents = make_vae().requires_grad_(False), make_inputs().latents.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        # One image at a time: on the CPU the size of a batch changes the last bits.
        alone = [vae.decode(z / vae.config["scaling_factor"]).sample for z in latents.split(1)]
        plain = decode_latents(vae, latents)
        light = decode_latents(vae, latents, checkpointing=True)
    expected = torch.cat(alone).float()
    assert plain.shape == (BATCH, 3, 8 * SIDE, 8 * SIDE) and plain.dtype == torch.float32
    assert torch.equal(plain, expected) and torch.equal(light, expected)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), latents)
    assert expected_gradient.abs().max() > 0
    for pixels in (plain, light):
        (actual,) = torch.autograd.grad(pixels.square().sum(), latents)
        torch.testing.assert_close(actual, expected_gradient, rtol=1e-6, atol=1e-6)
    vae.enable_gradient_checkpointing()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        nested = decode_latents(vae, latents, checkpointing=True)
    (actual,) = torch.autograd.grad(nested.square().sum(), latents)
    torch.testing.assert_close(actual, expected_gradient, rtol=1e-6, atol=1e-6)


def test_decoding_a_batch_equals_the_vae_on_the_batch() -> None:
    vae, latents = make_vae(), make_inputs().latents
    expected = vae.decode(latents / vae.config["scaling_factor"]).sample
    torch.testing.assert_close(decode_latents(vae, latents), expected, rtol=1e-5, atol=1e-5)


def test_decoding_in_bf16_returns_unclamped_fp32() -> None:
    vae = make_vae().to(torch.bfloat16)
    with torch.no_grad():
        vae.decoder.conv_out.bias.add_(5.0)
        pixels = decode_latents(vae, make_inputs().latents)
    assert pixels.dtype == torch.float32 and pixels.min() > 1.0
