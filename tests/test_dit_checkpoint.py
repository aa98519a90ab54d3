"""Weights of DiT: what a .pt file may be, what is said of one that does not fit, and fetching the published ones."""

import argparse
import io
import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from medart_core import dit_checkpoint
from medart_core.errors import UserError
from models import DiT

FACTORIES = {
    "DiT-S/2": lambda **shape: DiT(hidden_size=32, depth=2, num_heads=2, **shape),
    "DiT-B/2": lambda **shape: DiT(hidden_size=48, depth=3, num_heads=2, **shape),
}
FITTING = {"name": "DiT-S/2", "image_size": 32, "num_classes": 3}


def state(seed: int = 0, **settings) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return FACTORIES["DiT-S/2"](**{"input_size": 4, "num_classes": 3} | settings).state_dict()


def save(folder: Path, content) -> Path:
    torch.save(content, folder / "0000100.pt")
    return folder / "0000100.pt"


def first_layer(model) -> torch.Tensor:
    return model.x_embedder.proj.weight


def test_the_average_comes_first(tmp_path):
    args = {"model": "DiT-S/2", "class_names": ["a", "b", "c"]}
    content = {"model": state(0), "ema": state(1), "opt": {"state": {}}, "args": args}
    weights = dit_checkpoint.read(save(tmp_path, content))
    assert weights.args == args and weights.num_classes == 3
    model = dit_checkpoint.load(FACTORIES, weights, **FITTING)
    assert torch.equal(first_layer(model), state(1)["x_embedder.proj.weight"])
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("old_format", [False, True])
def test_older_files_are_read(tmp_path, old_format):
    args = argparse.Namespace(model="DiT-S/2", image_size=32)
    torch.save({"ema": state(1), "args": args}, tmp_path / "old.pt", _use_new_zipfile_serialization=not old_format)
    assert dit_checkpoint.read(tmp_path / "old.pt").args == {"model": "DiT-S/2", "image_size": 32}
    model = dit_checkpoint.load(FACTORIES, dit_checkpoint.read(save(tmp_path, state(2))), **FITTING)  # plain
    assert torch.equal(first_layer(model), state(2)["x_embedder.proj.weight"])


def test_weights_of_16_bits_and_with_qk_norm(tmp_path):
    half = {name: tensor.half() for name, tensor in state(qk_norm=True).items()}
    model = dit_checkpoint.load(FACTORIES, dit_checkpoint.read(save(tmp_path, half)), **FITTING)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert "blocks.1.attn.k_norm.weight" in model.state_dict()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_classes": 1000}, "knows 3 classes, not 1000; give --num-classes 3"),
        ({"image_size": 64}, "was trained at 32 pixels, not 64; give --image-size 32"),
        ({"name": "DiT-B/2"}, "is no DiT-B/2: its blocks.0.adaLN_modulation.1.bias has the shape"),
        ({"name": "DiT-M/2"}, "there is no model 'DiT-M/2'; choose from DiT-S/2"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, asked, message):
    with pytest.raises(UserError) as raised:
        dit_checkpoint.load(FACTORIES, dit_checkpoint.read(save(tmp_path, state())), **(FITTING | asked))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_missing_and_additional_tensors_are_named(tmp_path):
    for change in ({"pos_embed": None}, {"more": torch.zeros(2)}):
        content = {name: tensor for name, tensor in (state() | change).items() if tensor is not None}
        with pytest.raises(UserError, match=f"its {next(iter(change))} .*is missing"):
            dit_checkpoint.load(FACTORIES, dit_checkpoint.read(save(tmp_path, content)), **FITTING)


def test_files_that_are_no_weights(tmp_path):
    whole = save(tmp_path, state()).read_bytes()
    contents = {"cut.pt": whole[: len(whole) // 2], "noise.pt": b"noise" * 100, "empty.pt": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    torch.save([1], tmp_path / "list.pt")
    torch.save({"ema": state(), "args": Path("x")}, tmp_path / "code.pt")  # an object that is not let in
    for name in [*contents, "other.pt", "list.pt", "code.pt", "absent.pt"]:
        with pytest.raises(UserError) as raised:
            dit_checkpoint.read(tmp_path / name)
        assert name in str(raised.value) and "\n" not in str(raised.value)


def test_what_is_not_given_is_as_the_checkpoint_says(tmp_path):
    args = {"model": "DiT-S/2", "image_size": 32, "num_classes": 3}
    file = save(tmp_path, {"ema": state(), "args": args})
    model, weights = dit_checkpoint.open_model(FACTORIES, file)
    assert (model.input_size, model.num_classes, weights.args) == (4, 3, args)
    with pytest.raises(UserError, match="give --image-size 32"):
        dit_checkpoint.open_model(FACTORIES, file, image_size=64)
    with pytest.raises(UserError, match="there is no model 'DiT-XL/2'"):
        dit_checkpoint.open_model(FACTORIES, save(tmp_path, state()))
    with pytest.raises(UserError, match="no weights of DiT-B/2 are published, only DiT-XL/2's; give yours as --ckpt"):
        dit_checkpoint.open_model(FACTORIES, None, "DiT-B/2")


@pytest.mark.parametrize(
    ("trained", "asked", "expected"),
    [
        ({}, None, "mse"),
        ({"vae": "ema"}, None, "mse"),
        ({"vae": "nano"}, None, "nano"),
        ({"vae": "nano"}, "ema", "ema"),
    ],
)
def test_the_decoder_is_that_of_the_features(trained, asked, expected):
    assert dit_checkpoint.Weights({}, "x.pt", trained).vae(asked, "mse") == expected


@pytest.fixture
def server(tmp_path) -> str:
    """What stands for the server of the published files."""
    (tmp_path / "server").mkdir()
    torch.save(state(), tmp_path / "server" / "DiT-XL-2-256x256.pt")
    return (tmp_path / "server").as_uri() + "/"


def test_published_weights_are_fetched_once_and_held_against_their_first_hash(tmp_path, server, capsys):
    folder = tmp_path / "pretrained_models"
    file = dit_checkpoint.fetch(256, folder, server)
    assert file == folder / "DiT-XL-2-256x256.pt"
    assert "CC-BY-NC 4.0" in capsys.readouterr().out
    assert file.read_bytes() == (tmp_path / "server" / file.name).read_bytes()
    known = json.loads((folder / "sha256.json").read_text())
    assert known.keys() == {file.name} and len(known[file.name]) == 64
    (tmp_path / "server" / file.name).unlink()
    assert dit_checkpoint.fetch(256, folder, server) == file  # no network needed any more
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="is not the file that was first there"):
        dit_checkpoint.fetch(256, folder, server)


def test_without_a_network_the_file_and_its_place_are_named(tmp_path):
    with pytest.raises(UserError) as raised:
        dit_checkpoint.fetch(512, tmp_path / "pretrained_models", (tmp_path / "nowhere").as_uri() + "/")
    assert f"put it at {tmp_path / 'pretrained_models' / 'DiT-XL-2-512x512.pt'}" in str(raised.value)
    assert "nowhere/DiT-XL-2-512x512.pt" in str(raised.value) and "\n" not in str(raised.value)
    assert not any((tmp_path / "pretrained_models").iterdir())
    with pytest.raises(UserError, match="published for 256 and 512 pixels, not 128; give --ckpt"):
        dit_checkpoint.fetch(128, tmp_path)


def test_a_download_that_breaks_off_is_no_file(tmp_path, server, monkeypatch):
    class Short(io.BytesIO):
        headers: ClassVar = {"Content-Length": "1000"}

    monkeypatch.setattr(dit_checkpoint.urllib.request, "urlopen", lambda *_, **__: Short(b"x" * 600))
    with pytest.raises(UserError, match="600 of 1000 bytes"):
        dit_checkpoint.fetch(256, tmp_path / "pretrained_models", server)
    assert not any((tmp_path / "pretrained_models").iterdir())


def test_the_published_address():
    assert (
        f"{dit_checkpoint.URL}DiT-XL-2-512x512.pt" == "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-512x512.pt"
    )
