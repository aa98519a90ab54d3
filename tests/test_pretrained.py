"""Loading: the published repository's layout, nothing held twice, and T5 in 8 and 4 bits."""

import json
import shutil
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5EncoderModel

from medart_core import lora_layers, pretrained, quantization
from medart_core.errors import UserError
from medart_core.text import encode_prompts

CPU = torch.device("cpu")
CAPTIONS = ["a chest x-ray image of viral pneumonia", "a photo of a flower"]
# What the published transformer's configuration holds beside the shapes, from the time of Transformer2DModel.
LEGACY = {
    "_class_name": "Transformer2DModel", "_diffusers_version": "0.22.0.dev0", "double_self_attention": False,
    "num_vector_embeds": None, "only_cross_attention": False, "use_linear_projection": False,
}  # fmt: skip


def edit_json(file: Path, change: dict, drop: tuple[str, ...] = ()) -> None:
    content = {name: value for name, value in json.loads(file.read_text()).items() if name not in drop}
    file.write_text(json.dumps(content | change))


def train_spiece(folder: Path) -> None:
    """A T5 tokenizer as published: spiece.model and a few settings, no tokenizer.json."""
    import sentencepiece

    shutil.rmtree(folder)
    folder.mkdir()
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(f"a chest x-ray image of {word} pneumonia, hazy and grey" for word in "abcdefgh"))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "spiece"), vocab_size=48, hard_vocab_limit=False,
        model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    corpus.unlink()
    (folder / "spiece.vocab").unlink()
    settings = {"tokenizer_class": "T5Tokenizer", "model_max_length": 120, "extra_ids": 100, "legacy": True,
                "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def to_bin(part: Path) -> None:
    """Rewrite a part's safetensors, sharded or not, as the `.bin` files of before."""
    renamed = {}
    for file in sorted(part.glob("*.safetensors")):
        stem = file.stem.replace("model", "pytorch_model") if part.name == "text_encoder" else file.stem
        renamed[file.name] = f"{stem}.bin"
        torch.save(load_file(file), part / f"{stem}.bin")
        file.unlink()
    for index in part.glob("*.safetensors.index.json"):
        content = json.loads(index.read_text())
        content["weight_map"] = {key: renamed[name] for key, name in content["weight_map"].items()}
        (part / "pytorch_model.bin.index.json").write_text(json.dumps(content))
        index.unlink()


@pytest.fixture(scope="module", params=["safetensors", "bin"])
def published(request, tiny_pixart, tmp_path_factory) -> Path:
    """The tiny pipeline in the layout of PixArt-alpha/PixArt-XL-2-512x512."""
    folder = tmp_path_factory.mktemp("published") / "pixart"
    shutil.copytree(tiny_pixart, folder)
    shutil.rmtree(folder / "text_encoder")
    T5EncoderModel.from_pretrained(tiny_pixart / "text_encoder").save_pretrained(
        folder / "text_encoder", max_shard_size="20KB"
    )
    edit_json(folder / "transformer" / "config.json", LEGACY, drop=("use_additional_conditions",))
    edit_json(folder / "model_index.json", {"transformer": ["diffusers", "Transformer2DModel"]})
    train_spiece(folder / "tokenizer")
    if request.param == "bin":
        for part in ("text_encoder", "vae", "transformer"):
            to_bin(folder / part)
    assert len(list((folder / "text_encoder").glob(f"*model-0000?-of-0000?.{request.param}"))) >= 2
    assert sorted(file.name for file in (folder / "tokenizer").iterdir()) == ["spiece.model", "tokenizer_config.json"]
    return folder


def test_the_published_layout_loads_and_nothing_is_held_twice(published, tiny_pixart, monkeypatch):
    reference = pretrained.load(tiny_pixart, torch.float32, CPU)
    born: dict[str, set[str]] = {}
    kinds: list[Any] = [T5EncoderModel, AutoencoderKL, PixArtTransformer2DModel]
    for kind in kinds:

        @wraps(kind.__init__)  # diffusers reads the signature
        def watched(self, *args, original=kind.__init__, **kwargs):
            original(self, *args, **kwargs)
            born[type(self).__name__] = {parameter.device.type for parameter in self.parameters()}

        monkeypatch.setattr(kind, "__init__", watched)
    model = pretrained.load(published, torch.float32, CPU)
    assert born == {kind.__name__: {"meta"} for kind in kinds}
    for part in ("text_encoder", "vae", "transformer"):
        ours, theirs = getattr(model, part).state_dict(), getattr(reference, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert not any(p.requires_grad for p in getattr(model, part).parameters())
    embeds, mask = encode_prompts(model.tokenizer, model.text_encoder, CAPTIONS)
    assert embeds.isfinite().all() and (mask.sum(dim=1) > 3).all()
    assert model.tokenizer("a").input_ids[-1] == 1 and model.image_size == 32


def test_every_file_is_read_in_the_dtype_asked_for(published):
    model = pretrained.load(published, torch.bfloat16, CPU)
    for part in (model.text_encoder, model.vae, model.transformer):
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}


def test_a_missing_shard_is_named(published, tmp_path):
    folder = tmp_path / "pixart"
    shutil.copytree(published, folder)
    next((folder / "text_encoder").glob("*model-00002-of-*")).unlink()
    with pytest.raises(UserError, match="model-00002-of"):
        pretrained.load(folder, torch.float32, CPU)


@pytest.mark.parametrize("part", ["text_encoder", "vae", "transformer", "tokenizer"])
def test_a_damaged_part_is_one_line_with_the_folder(tiny_pixart, tmp_path, part):
    folder = shutil.copytree(tiny_pixart, tmp_path / "pixart")
    file = next((folder / part).glob("*.safetensors"), folder / part / "tokenizer.json")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=f"^cannot load {folder}: [^\n]*$"):
        pretrained.load(folder, torch.float32, CPU)


@pytest.mark.parametrize("file_type", ["safetensors", "bin"])
@pytest.mark.parametrize("part", ["text_encoder", "vae", "transformer"])
def test_weights_of_another_model_are_refused_in_one_line(tiny_pixart, tmp_path, part, file_type):
    """Else the libraries would leave T5 random, with a warning, and the others empty."""
    folder = shutil.copytree(tiny_pixart, tmp_path / "pixart")
    [file] = (folder / part).glob("*.safetensors")
    save_file({"cls.weight": torch.ones(2, 2)}, file, {"format": "pt"})
    if file_type == "bin":
        to_bin(folder / part)
    message = rf"^cannot load {folder}: {part} lacks \d+ weights such as [^\n]*another model[^\n]*$"
    with pytest.raises(UserError, match=message):
        pretrained.load(folder, torch.float32, CPU)


def test_a_bin_file_of_something_else_is_refused_in_one_line(tiny_pixart, tmp_path):
    folder = shutil.copytree(tiny_pixart, tmp_path / "pixart")
    to_bin(folder / "text_encoder")
    torch.save(torch.nn.Linear(1, 1), folder / "text_encoder" / "pytorch_model.bin")  # code, which is not run
    with pytest.raises(UserError, match=f"^cannot load {folder}: [^\n]*$"):
        pretrained.load(folder, torch.float32, CPU)


def test_a_full_device_is_no_damaged_model(tiny_pixart, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(pretrained, "_load_text_encoder", fail)
    with pytest.raises(torch.OutOfMemoryError):
        pretrained.load(tiny_pixart, torch.float32, CPU)


@pytest.fixture(scope="module", params=quantization.KINDS)
def quantized(request) -> pretrained.PixArt:
    """The bundled model with a quantised T5."""
    return pretrained.load(None, torch.bfloat16, CPU, text_encoder_quantization=request.param)


def test_all_of_t5_is_quantised_and_says_nearly_the_same(quantized):
    linear = [module for module in quantized.text_encoder.modules() if isinstance(module, nn.Linear)]
    assert len(linear) == 21 and not any(type(module) is nn.Linear for module in linear)
    full = pretrained.load(None, torch.bfloat16, CPU)
    embeds, mask = encode_prompts(quantized.tokenizer, quantized.text_encoder, CAPTIONS)
    expected, _ = encode_prompts(full.tokenizer, full.text_encoder, CAPTIONS)
    assert embeds.dtype == torch.bfloat16
    similarity = torch.cosine_similarity(embeds.float(), expected.float(), dim=-1)[mask.bool()]
    assert similarity.min() > 0.95 and similarity.mean() > 0.98


def test_loading_leaves_the_library_as_it_was(quantized):
    assert T5EncoderModel._keep_in_fp32_modules == ["wo"]


def test_adapters_on_a_quantised_t5_are_fp32_and_learn(quantized):
    torch.manual_seed(0)
    adapted = lora_layers.attach(quantized.text_encoder, lora_layers.TEXT_ENCODER_TARGETS, rank=4)
    model = pretrained.PixArt(quantized.tokenizer, adapted, quantized.vae, quantized.transformer, None, "quantised")
    pretrained.set_gradient_checkpointing(model, True)
    parameters = list(lora_layers.trainable_parameters(adapted))
    assert sum(name.endswith(".lora_A") for name, _ in adapted.named_modules()) == 21
    assert {p.dtype for p in parameters} == {torch.float32}
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2), []
    target = torch.randn(192)
    with torch.no_grad():  # as a sample grid does before the first step
        encode_prompts(model.tokenizer, adapted.eval(), CAPTIONS)
    for step in range(6):
        adapted.train(step > 2)  # with and without gradient checkpointing
        with torch.autocast("cpu", torch.bfloat16):
            embeds, _ = encode_prompts(model.tokenizer, adapted, CAPTIONS)
        loss = (embeds.float() - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


def test_checkpointing_alternates_and_changes_no_gradient(tiny_pixart):
    model = pretrained.load(tiny_pixart, torch.float32, CPU)
    model.text_encoder = lora_layers.attach(model.text_encoder, lora_layers.TEXT_ENCODER_TARGETS, rank=2)
    model.transformer = lora_layers.attach(model.transformer, lora_layers.TRANSFORMER_TARGETS, rank=2)
    parameters = [
        p for part in (model.text_encoder, model.transformer) for p in lora_layers.trainable_parameters(part)
    ]
    latents, timesteps, conditions = torch.randn(2, 4, 4, 4), torch.tensor([10, 500]), {}
    gradients, saved = [], []
    for wanted in (False, True, False):
        pretrained.set_gradient_checkpointing(model, wanted)
        count = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, count=count: count.append(1) or t, lambda t: t):
            embeds, mask = encode_prompts(model.tokenizer, model.text_encoder, CAPTIONS)
            noise = model.transformer(latents, embeds, timesteps, conditions, encoder_attention_mask=mask).sample
            pixels = model.vae.decode(noise.chunk(2, dim=1)[0]).sample
        pixels.square().mean().backward()
        gradients.append(lora_layers.gradients(parameters))
        saved.append(len(count))
        for parameter in parameters:
            parameter.grad = None
    assert gradients[0].norm() > 0 and torch.equal(gradients[0], gradients[2])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert saved[1] < saved[0] / 2 and saved[2] < 1.1 * saved[0]  # T5's embeddings go on requiring a gradient
