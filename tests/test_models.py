"""models.py: the published counts, names and shapes; the forward pass against diffusers' own DiT; its switches."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import models
from diffusers_grad.attention import attend
from models import DiT, DiT_models

PARAMETERS = {  # closed form; DiT-XL/2's is printed in published logs
    "DiT-S/2": 32_963_360, "DiT-S/4": 32_945_024, "DiT-S/8": 33_148_160,
    "DiT-B/2": 130_512_416, "DiT-B/4": 130_475_648, "DiT-B/8": 130_881_536,
    "DiT-L/2": 458_102_816, "DiT-L/4": 458_053_760, "DiT-L/8": 458_594_816,
    "DiT-XL/2": 675_129_632, "DiT-XL/4": 675_074_432, "DiT-XL/8": 675_683_072,
}  # fmt: skip


def tiny(seed: int = 0, **settings) -> DiT:
    """A DiT whose every weight is random, so that nothing is hidden behind a zero gate."""
    torch.manual_seed(seed)
    shape = {"input_size": 8, "hidden_size": 32, "depth": 3, "num_heads": 2, "num_classes": 10}
    model = DiT(**{**shape, **settings}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.2)
    return model


def inputs(n: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, 8, 8, generator=generator), torch.tensor([0, 500, 999])[:n], torch.tensor([0, 9, 10])[:n]


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameter_counts(name, count):
    with torch.device("meta"):
        model = DiT_models[name](input_size=32, num_classes=1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_the_table_is_complete():
    assert DiT_models.keys() == PARAMETERS.keys()


def test_names_and_shapes_of_the_published_checkpoints():
    with torch.device("meta"):
        state = DiT_models["DiT-XL/2"](input_size=64, num_classes=1000).state_dict()
    block = {
        "attn.qkv.weight": (3456, 1152), "attn.qkv.bias": (3456,), "attn.proj.weight": (1152, 1152),
        "attn.proj.bias": (1152,), "mlp.fc1.weight": (4608, 1152), "mlp.fc1.bias": (4608,),
        "mlp.fc2.weight": (1152, 4608), "mlp.fc2.bias": (1152,),
        "adaLN_modulation.1.weight": (6912, 1152), "adaLN_modulation.1.bias": (6912,),
    }  # fmt: skip
    expected = {
        "pos_embed": (1, 1024, 1152), "x_embedder.proj.weight": (1152, 4, 2, 2), "x_embedder.proj.bias": (1152,),
        "t_embedder.mlp.0.weight": (1152, 256), "t_embedder.mlp.0.bias": (1152,),
        "t_embedder.mlp.2.weight": (1152, 1152), "t_embedder.mlp.2.bias": (1152,),
        "y_embedder.embedding_table.weight": (1001, 1152),
        "final_layer.linear.weight": (32, 1152), "final_layer.linear.bias": (32,),
        "final_layer.adaLN_modulation.1.weight": (2304, 1152), "final_layer.adaLN_modulation.1.bias": (2304,),
    } | {f"blocks.{n}.{name}": shape for n in range(28) for name, shape in block.items()}  # fmt: skip
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


def diffusers_twin(model: DiT) -> Any:
    """The same network in diffusers, which has an embedder of its own in every block."""
    from diffusers import DiTTransformer2DModel

    twin: Any = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    old = model.state_dict()
    new = {f"pos_embed.proj.{end}": old[f"x_embedder.proj.{end}"] for end in ("weight", "bias")}
    for end in ("weight", "bias"):
        new[f"proj_out_1.{end}"] = old[f"final_layer.adaLN_modulation.1.{end}"]
        new[f"proj_out_2.{end}"] = old[f"final_layer.linear.{end}"]
        for n in range(3):
            theirs, ours = f"transformer_blocks.{n}", f"blocks.{n}"
            new[f"{theirs}.norm1.emb.timestep_embedder.linear_1.{end}"] = old[f"t_embedder.mlp.0.{end}"]
            new[f"{theirs}.norm1.emb.timestep_embedder.linear_2.{end}"] = old[f"t_embedder.mlp.2.{end}"]
            table = old["y_embedder.embedding_table.weight"]
            new[f"{theirs}.norm1.emb.class_embedder.embedding_table.weight"] = table
            new[f"{theirs}.norm1.linear.{end}"] = old[f"{ours}.adaLN_modulation.1.{end}"]
            for name, part in zip("qkv", old[f"{ours}.attn.qkv.{end}"].chunk(3), strict=True):
                new[f"{theirs}.attn1.to_{name}.{end}"] = part
            new[f"{theirs}.attn1.to_out.0.{end}"] = old[f"{ours}.attn.proj.{end}"]
            new[f"{theirs}.ff.net.0.proj.{end}"] = old[f"{ours}.mlp.fc1.{end}"]
            new[f"{theirs}.ff.net.2.{end}"] = old[f"{ours}.mlp.fc2.{end}"]
    missing, unexpected = twin.load_state_dict(new, strict=False)
    assert not unexpected and all(name == "pos_embed.pos_embed" for name in missing)
    for block in twin.transformer_blocks:
        # diffusers' frequencies end at 1/10000, those that the published weights were trained with just before it.
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return twin.eval()


@torch.no_grad()
def test_forward_is_that_of_diffusers():
    model, (x, t, y) = tiny(), inputs()
    theirs = diffusers_twin(model)(x, timestep=t, class_labels=y).sample
    assert theirs.std() > 0.1
    torch.testing.assert_close(model(x, t, y), theirs, rtol=1e-4, atol=1e-4)


def test_a_new_model_is_the_identity_with_output_zero():
    torch.manual_seed(0)
    model = DiT_models["DiT-S/8"](input_size=16, num_classes=3).eval()
    tokens, condition = torch.randn(2, 4, 384), torch.randn(2, 384)
    assert torch.equal(next(iter(model.blocks))(tokens, condition), tokens)
    assert not model(torch.randn(2, 4, 16, 16), torch.tensor([3, 4]), torch.tensor([0, 3])).any()
    assert next(model.t_embedder.parameters()).std().item() == pytest.approx(0.02, rel=0.05)
    assert model.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.1)
    # Xavier's bound for the patches counts the flattened patch as inputs.
    assert model.x_embedder.proj.weight.abs().max().item() == pytest.approx((6 / (384 + 256)) ** 0.5, rel=0.01)


def test_labels_are_dropped_in_training_only():
    model, (x, t, _) = tiny(), inputs()
    y, null = torch.tensor([0, 1, 2]), torch.full((3,), 10)
    with torch.no_grad():
        kept, dropped = model(x, t, y), model(x, t, null)
        one = model(x, t, y, drop=torch.tensor([False, True, False]))
        torch.testing.assert_close(one[1], dropped[1])
        torch.testing.assert_close(one[[0, 2]], kept[[0, 2]])
        assert torch.equal(model(x, t, y, drop=torch.zeros(3, dtype=torch.bool)), kept)
        many = torch.zeros(10_000, dtype=torch.int64)
        embedded = model.train().y_embedder(many, None)
    share = (embedded == model.y_embedder.embedding_table.weight[10]).all(dim=1).float().mean().item()
    assert share == pytest.approx(0.1, abs=0.01)


def test_without_dropout_there_is_no_null_class():
    model = tiny(class_dropout_prob=0).train()
    assert model.y_embedder.embedding_table.weight.shape == (10, 32)
    assert torch.equal(model(*inputs(2)), model(*inputs(2)))


@torch.no_grad()
@pytest.mark.parametrize("channels", [3, 4])
def test_guidance(channels):
    model, (x, t, _) = tiny(), inputs()
    y, null = torch.tensor([1, 2, 3]), torch.full((3,), 10)
    both = torch.cat([x, torch.full_like(x, 99)])  # only the first half is read
    out = model.forward_with_cfg(both, torch.cat([t, t]), torch.cat([y, null]), 4.0, channels)
    cond, uncond = model(x, t, y), model(x, t, null)
    expected = uncond[:, :channels] + 4 * (cond[:, :channels] - uncond[:, :channels])
    for half, own in zip(out.chunk(2), (cond, uncond), strict=True):
        torch.testing.assert_close(half[:, :channels], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(half[:, channels:], own[:, channels:], rtol=1e-4, atol=1e-5)


def gradients(model: DiT) -> list[torch.Tensor]:
    model.zero_grad()
    x, t, y = inputs()
    model(x, t, y).square().mean().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def saved_bytes(model: DiT) -> int:
    total = 0

    def count(tensor):
        nonlocal total
        total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model(*inputs())
    return total


def products(model: DiT) -> int:
    """How many matrix products a forward and backward pass take."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.total += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            return func(*args, **(kwargs or {}))

    with Count() as counter:
        gradients(model)
    return counter.total


def test_checkpointing_changes_memory_and_nothing_else(monkeypatch):
    model = tiny()
    plain, plain_products, plain_bytes = gradients(model), products(model), saved_bytes(model)
    for mode, more_products in (("full", 3 * 5), ("selective", 0)):
        model.set_checkpointing(mode)
        for ours, theirs in zip(gradients(model), plain, strict=True):
            assert torch.equal(ours, theirs)
        assert saved_bytes(model) < plain_bytes / 2  # what selective keeps is kept outside of autograd
        assert products(model) == plain_products + more_products
        with torch.no_grad(), monkeypatch.context() as patch:
            patch.setattr(models, "checkpoint", None)  # would fail if it were called
            model(*inputs())
    with pytest.raises(ValueError, match="none, full, selective"):
        model.set_checkpointing("some")


@pytest.mark.parametrize(("dtype", "stream"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_autocast(dtype, stream):
    model, (x, t, y) = tiny(), inputs()
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=dtype):
        out = model(x, t, y)
    assert seen == [stream] * 3
    torch.testing.assert_close(out.float(), model(x, t, y), rtol=0.1, atol=0.15)


@torch.no_grad()
def test_weights_in_bf16():
    model, (x, t, y) = tiny(), inputs()
    full = model(x, t, y)
    half = model.bfloat16()(x, t, y)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=0.1, atol=0.15)


def test_qk_norm():
    model = tiny(qk_norm=True)
    assert "blocks.0.attn.q_norm.weight" in model.state_dict()
    with torch.no_grad():
        before = model(*inputs())
        for name in ("weight", "bias"):
            model.get_parameter(f"blocks.0.attn.qkv.{name}")[:64] *= 1000  # queries and keys, not values
        torch.testing.assert_close(model(*inputs()), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_compiled_blocks(mode):
    model = tiny()
    plain = gradients(model)
    model.set_checkpointing(mode)
    names, graphs = [*model.state_dict()], []
    torch._dynamo.reset()

    def backend(graph, example_inputs):
        graphs.append(graph)
        return aot_eager(graph, example_inputs)

    model.compile_blocks(backend=backend)
    assert [*model.state_dict()] == names
    for ours, theirs in zip(gradients(model), plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(graphs) == 1  # serves all three blocks
    with torch.no_grad():
        model(*inputs())
        model(*inputs(2))
    assert len(graphs) == 3


def test_another_attention_gives_the_same_up_to_rounding():
    model = tiny().to(torch.bfloat16)
    stock = model(*inputs())
    model.set_attention(attend)
    other = model(*inputs())
    assert not torch.equal(stock, other)  # or it was not used
    assert ((stock - other).float().norm() / stock.float().norm()).item() < 0.02
