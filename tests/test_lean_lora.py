"""The lean LoRA forward and the compiled blocks against PEFT's own layers and the plain ones."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

from diffusers_grad import sample_latents
from medart_core import compilation, lean_lora, lora_layers, pretrained
from medart_core.lean_lora import LeanLinear
from medart_core.text import encode_prompts, encode_with_negative

RANK, WIDTH = 4, 32


class Layers(nn.Module):
    """Two linear layers, so that the second one's input has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, WIDTH), nn.Linear(WIDTH, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh())


def make_adapted(base_dtype: torch.dtype = torch.float32, **options) -> peft.PeftModel:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=3, target_modules=["first", "second"], init_lora_weights=False, **options
    )
    return peft.get_peft_model(Layers().to(base_dtype), config)  # pyright: ignore[reportArgumentType]


def result(model: nn.Module, autocast: bool = False, shape=(2, 5, 24)) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(x)
    model.zero_grad()
    out.float().square().sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.dtype == expected.dtype and expected.abs().max() > 0
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("shape", [(2, 5, 24), (3, 24)])
@pytest.mark.parametrize(
    ("base_dtype", "autocast", "tolerance"),
    [(torch.float32, False, 1e-6), (torch.float32, True, 1e-2), (torch.bfloat16, True, 1e-2)],
    ids=["fp32", "fp32 base, autocast", "bf16 base, autocast"],
)
def test_outputs_and_gradients_are_those_of_peft(base_dtype, autocast, tolerance, shape):
    model = make_adapted(base_dtype)
    expected, expected_gradients = result(model, autocast, shape)
    assert lean_lora.enable(model) == 2 and lean_lora.enable(model) == 0
    actual, gradients = result(model, autocast, shape)
    assert relative_error(actual, expected) <= tolerance
    assert gradients.keys() == expected_gradients.keys() and len(gradients) == 4
    for name, gradient in expected_gradients.items():
        assert gradient.dtype == torch.float32  # the master adapters'
        assert relative_error(gradients[name], gradient) <= tolerance, name


def test_under_autocast_half_the_casts_and_less_memory():
    def cost(model) -> tuple[int, int]:
        kept: dict[int, int] = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(64, 24, dtype=torch.bfloat16, requires_grad=True)
        saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.profiler.profile() as profile, saved, torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        casts = sum(event.count for event in profile.key_averages() if event.key == "aten::_to_copy")
        assert out.requires_grad
        return casts, sum(kept.values())

    model = make_adapted(torch.bfloat16)
    casts, memory = cost(model)
    lean_lora.enable(model)
    lean_casts, lean_memory = cost(model)
    assert lean_casts <= casts / 2
    assert lean_memory < memory


def test_names_and_files_stay_pefts(tmp_path):
    model = make_adapted()
    names = list(model.state_dict())
    lean_lora.enable(model)
    assert list(model.state_dict()) == names
    expected = result(model)[0]
    model.save_pretrained(str(tmp_path))
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(Layers(), str(tmp_path), is_trainable=True)  # pyright: ignore
    assert relative_error(result(loaded)[0], expected) <= 1e-6
    merged = copy.deepcopy(model).merge_and_unload()  # pyright: ignore[reportCallIssue]
    x = torch.randn(2, 24)
    torch.testing.assert_close(merged(x), model(x), rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert relative_error(model(x), expected[:1, 0] * 0 + model.get_base_model()(x)) == 0


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}],
    ids=lambda options: next(iter(options)),
)
def test_other_kinds_of_adapters_run_as_pefts_own(options):
    model = make_adapted(**options)
    torch.manual_seed(5)
    expected = result(model)
    lean_lora.enable(model)
    torch.manual_seed(5)
    actual = result(model)
    assert torch.equal(actual[0], expected[0])
    assert all(torch.equal(actual[1][name], gradient) for name, gradient in expected[1].items())


def test_a_bf16_base_without_autocast_runs_as_pefts_own():
    model = make_adapted(torch.bfloat16)
    x = torch.randn(2, 24, dtype=torch.bfloat16)
    expected = model(x)
    lean_lora.enable(model)
    assert torch.equal(model(x), expected)


# --- Merged for many calls ---


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_merged_layers_give_the_products_and_gradients_of_the_rounded_sum(base_dtype):
    """The reference: W + s B A with a gradient, rounded to the base's dtype, as the weight of a plain product."""
    model = make_adapted(base_dtype)
    lean_lora.enable(model)
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1)).to(base_dtype)
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    inner: Any = model.base_model.model

    def through_sums() -> torch.Tensor:
        hidden = x
        for layer in (inner.first, inner.second):
            hidden = hidden.tanh() if layer is inner.second else hidden
            delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            merged = (layer.base_layer.weight.float() + delta).to(base_dtype)
            hidden = nn.functional.linear(hidden, merged, layer.base_layer.bias)
        return hidden

    expected = torch.stack([through_sums(), through_sums()])
    expected_gradients = torch.autograd.grad(expected.float().square().sum(), list(adapters.values()))
    with lean_lora.merged(model):
        actual = torch.stack([model(x), model(x)])  # as in a rollout: the gradients of two calls add up
        gradients = torch.autograd.grad(actual.float().square().sum(), list(adapters.values()))
    tolerance = 1e-6 if base_dtype == torch.float32 else 1e-2
    assert relative_error(actual, expected) <= tolerance
    for name, gradient, reference in zip(adapters, gradients, expected_gradients, strict=True):
        assert gradient.dtype == torch.float32 and relative_error(gradient, reference) <= tolerance, name


def test_merging_ends_with_its_context_and_is_for_plain_adapters_alone():
    model = make_adapted()
    lean_lora.enable(model)
    expected = result(model)[0]
    layers = [module for module in model.modules() if isinstance(module, LeanLinear)]
    with pytest.raises(KeyError), lean_lora.merged(model):
        assert all(layer.product is not None for layer in layers)
        assert relative_error(result(model)[0], expected) <= 1e-6
        raise KeyError
    assert all(layer.product is None and "product" not in vars(layer) for layer in layers)
    with lean_lora.merged(model, wanted=False):
        assert all(layer.product is None for layer in layers)
    dora = make_adapted(use_dora=True)
    lean_lora.enable(dora)
    expected = dora(torch.ones(1, 24))
    with lean_lora.merged(dora):
        assert torch.equal(dora(torch.ones(1, 24)), expected)


def test_an_adapter_that_peft_has_put_into_the_weights_counts_once():
    model = make_adapted()
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    expected = model(x)
    lean_lora.enable(model)
    model.merge_adapter()
    assert relative_error(model(x), expected) <= 1e-6
    model.unmerge_adapter()
    assert relative_error(model(x), expected) <= 1e-6


# --- The whole model ---


def training_step(
    model: pretrained.PixArt, caption: str = "a chest x-ray image"
) -> tuple[float, dict[str, torch.Tensor]]:
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    captions = [f"{caption} of normal lungs", caption]
    with torch.autocast("cpu", torch.bfloat16):
        embeds, mask = encode_prompts(model.tokenizer, model.text_encoder, captions)
        out = model.transformer(
            latents,
            encoder_hidden_states=embeds,
            encoder_attention_mask=mask,
            timestep=torch.tensor([400, 20]),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
    loss = out.float().square().mean()
    loss.backward()
    gradients = {}
    for network in (model.transformer, model.text_encoder):
        gradients |= {name: p.grad.clone() for name, p in network.named_parameters() if p.requires_grad}
        network.zero_grad()
    return loss.item(), gradients


@pytest.fixture
def model(tiny_pixart) -> pretrained.PixArt:
    model = pretrained.load(tiny_pixart, torch.bfloat16, torch.device("cpu"))
    torch.manual_seed(0)
    model.transformer = lora_layers.attach(model.transformer, lora_layers.TRANSFORMER_TARGETS, RANK)
    model.text_encoder = lora_layers.attach(model.text_encoder, lora_layers.TEXT_ENCODER_TARGETS, RANK)
    for network in (model.transformer, model.text_encoder):
        lean_lora.disable(network)  # which `attach` has enabled
        with torch.no_grad():
            for parameter in lora_layers.trainable_parameters(network):
                parameter.normal_(std=0.1)
    return model


def assert_same_step(actual, expected, tolerance: float) -> None:
    assert actual[0] == pytest.approx(expected[0], rel=tolerance)
    assert actual[1].keys() == expected[1].keys()
    joined = [torch.cat([g.flatten() for g in gradients.values()]) for gradients in (actual[1], expected[1])]
    assert relative_error(*joined) <= tolerance


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_is_that_of_peft(model, checkpointing):
    if checkpointing:
        pretrained.set_gradient_checkpointing(model, True)
    expected = training_step(model)
    assert lean_lora.enable(model.transformer) > 20 and lean_lora.enable(model.text_encoder) == 14
    assert_same_step(training_step(model), expected, 0.03)
    assert any(isinstance(module, LeanLinear) for module in model.transformer.modules())


def rollout(model: pretrained.PixArt, merged: bool, autocast: bool, **options) -> tuple[torch.Tensor, dict]:
    """Latents of a short rollout and the gradients of all adapters."""
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    adapters = {name: p for name, p in model.transformer.named_parameters() if p.requires_grad}
    adapters |= {f"text.{name}": p for name, p in model.text_encoder.named_parameters() if p.requires_grad}
    with lean_lora.merged(model.transformer, merged):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            prompts = encode_with_negative(model.tokenizer, model.text_encoder, ["a chest x-ray"])
            steps: dict[str, Any] = {"num_inference_steps": 4, "k": 2, "generator": torch.Generator().manual_seed(1)}
            latents = sample_latents(model.transformer, model.scheduler, noise, *prompts, **steps, **options)
        gradients = torch.autograd.grad(latents.square().sum(), list(adapters.values()))
    return latents.detach(), dict(zip(adapters, gradients, strict=True))


@pytest.mark.parametrize("gradient", ["full", "last_k", "sparse", "one_step"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
def test_a_merged_rollout_is_the_separate_one_in_fp32(model, gradient, checkpointing):
    for network in (model.transformer, model.text_encoder):
        network.float()
        lean_lora.enable(network)
    pretrained.set_gradient_checkpointing(model, checkpointing)
    options: dict[str, Any] = {"autocast": False, "gradient": gradient, "checkpoint_steps": checkpointing}
    expected, actual = (rollout(model, merged, **options) for merged in (False, True))
    assert relative_error(actual[0], expected[0]) <= 1e-5
    assert all(gradient.abs().max() > 0 for gradient in expected[1].values())
    assert_same_step((0, actual[1]), (0, expected[1]), 1e-4)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
def test_a_merged_rollout_in_bf16_begins_as_the_base_and_learns_alike(model, checkpointing):
    for network in (model.transformer, model.text_encoder):
        lean_lora.enable(network)
    pretrained.set_gradient_checkpointing(model, checkpointing)
    options: dict[str, Any] = {"autocast": True, "gradient": "full", "checkpoint_steps": checkpointing}
    assert_same_step((0, rollout(model, True, **options)[1]), (0, rollout(model, False, **options)[1]), 0.1)
    with torch.no_grad():
        for name, parameter in model.transformer.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    expected, actual = (rollout(model, merged, **options) for merged in (False, True))
    assert relative_error(actual[0], expected[0]) <= 0.01  # products of another width may round otherwise
    assert_same_step((0, actual[1]), (0, expected[1]), 0.1)


def test_a_merged_rollout_takes_fewer_operations(model):
    lean_lora.enable(model.transformer)

    def operations(merged: bool) -> int:
        with torch.profiler.profile() as profile:
            rollout(model, merged, autocast=True, gradient="full")
        return sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm"))

    assert operations(True) < 0.8 * operations(False)


def check_compiled_steps(model: pretrained.PixArt, backend: str) -> None:
    lean_lora.enable(model.transformer)
    lean_lora.enable(model.text_encoder)
    expected = training_step(model)
    names = [*model.transformer.state_dict(), *model.text_encoder.state_dict()]
    torch._dynamo.reset()
    compilation.enable(model, backend)
    assert [*model.transformer.state_dict(), *model.text_encoder.state_dict()] == names
    assert_same_step(training_step(model), expected, 0.05)
    pretrained.set_gradient_checkpointing(model, True)
    assert_same_step(training_step(model), expected, 0.05)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_blocks_are_traced_whole_and_train_alike(model):
    check_compiled_steps(model, "eager")


def test_compiled_blocks_serve_merged_rollouts_with_one_graph_more(model):
    for network in (model.transformer, model.text_encoder):
        lean_lora.enable(network)
    options: dict[str, Any] = {"autocast": True, "gradient": "full"}
    expected = rollout(model, True, **options)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compilation.enable(model, "eager")
    graphs = []
    for merged in (True, True, False, True):
        actual = rollout(model, merged, **options)
        assert_same_step((0, actual[1]), (0, expected[1]), 0.1)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[0] and graphs[3] == graphs[2]
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.skipif(" " in torch.__file__, reason="torch does not quote its own path for the compiler")
def test_compiled_blocks_train_alike_with_few_graphs(model):
    check_compiled_steps(model, "inductor")
    for words in range(8, 80, 16):
        training_step(model, "x-ray " * words)
    with torch.no_grad():
        encode_prompts(model.tokenizer, model.text_encoder, ["a", "b"])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 16
