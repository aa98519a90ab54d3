"""sample.py: the printed rule of families, and the files that it writes."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_lora import write_run

import sample
from medart_core import dit_checkpoint, full_size, lora, pretrained, tuned_model
from medart_core.errors import UserError
from models import DiT_models


def family(monkeypatch, run, *arguments):
    monkeypatch.setattr(sys, "argv", ["sample.py", *arguments])
    return sample.choose_family(sample.parse_options(), run)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "DiT-XL/2", "--prompt", "x"], "DiT"),
        (["--ckpt", "x.pt"], "DiT"),
        (["--class-labels", "1", "2"], "DiT"),
        (["--prompt", "x"], "PixArt"),
        (["--prompts", "x.txt", "--image-size", "512"], "PixArt"),
        (["--lora", "x"], "PixArt"),
        (["--image-size", "512", "--seed", "1"], "DiT"),
        (["--image-size", "256"], "DiT"),
        ([], "PixArt"),
        (["--image-size", "64"], "PixArt"),
    ],
)
def test_family_without_a_finished_run(monkeypatch, tmp_path, arguments, expected):
    assert family(monkeypatch, tmp_path, *arguments)[0] == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "with the finished run"),
        (["--image-size", "512"], "with the finished run"),
        (["--image-size", "256"], "DiT-XL/2"),
    ],
)
def test_a_finished_run_of_the_asked_size_comes_first(monkeypatch, tmp_path, arguments, expected):
    (tmp_path / "finished.json").write_text("{}")
    (tmp_path / "options.json").write_text(json.dumps({"resolution": 512}))
    assert expected in family(monkeypatch, tmp_path, *arguments)[1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "with the finished run"),
        (["--image-size", "512"], "with the finished run"),
        (["--image-size", "512x512"], "with the finished run"),
        (["--image-size", "256"], "DiT-XL/2"),
    ],
)
def test_a_run_of_its_models_own_size_says_which(monkeypatch, tmp_path, arguments, expected):
    (tmp_path / "finished.json").write_text(json.dumps({"resolution": [512, 512]}))
    (tmp_path / "options.json").write_text(json.dumps({"resolution": None}))
    assert expected in family(monkeypatch, tmp_path, *arguments)[1]


@pytest.mark.parametrize("name", ["finished.json", "options.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_a_damaged_file_of_a_run_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} (cannot be read|is not of medart.py)[^\n]*$"):
        tuned_model.run_settings(tmp_path)


def test_settings_of_a_run_from_its_folder_a_checkpoint_and_a_file(monkeypatch, tmp_path):
    checkpoint, file = tmp_path / "run" / "checkpoint-5", tmp_path / "run" / "one.safetensors"
    checkpoint.mkdir(parents=True)
    file.touch()
    (tmp_path / "run" / "options.json").write_text(json.dumps({"validation_prompt": ["x"], "max_token_length": 77}))
    expected = {"validation_prompt": ["x"], "max_token_length": 77}
    for finished in ({}, {"prompts": ["a chest"], "max_token_length": 60}):
        (tmp_path / "run" / "finished.json").write_text(json.dumps(finished))
        for place in (file.parent, file, checkpoint):
            assert tuned_model.run_settings(place) == expected | finished
    monkeypatch.chdir(checkpoint)
    assert tuned_model.run_settings(Path("."))["max_token_length"] == 60
    assert tuned_model.run_settings(tmp_path) == {}


def test_random_weights_are_for_who_asks_and_for_loras_made_on_them(monkeypatch):
    monkeypatch.setattr(full_size, "build_random", lambda *_: "random")
    monkeypatch.setattr(pretrained, "load", lambda name, *_: name)
    monkeypatch.setattr(lora, "apply", lambda *_: None)
    where = torch.float32, torch.device("cpu")
    for arguments, base, expected in (
        (["--random-weights"], None, "random"),
        (["--lora", "x"], full_size.NAME, "random"),
        (["--lora", "x"], "some/model", "some/model"),
    ):
        monkeypatch.setattr(sys, "argv", ["sample.py", *arguments])
        monkeypatch.setattr(lora, "read", lambda _: {})
        monkeypatch.setattr(lora, "base_model", lambda _, base=base: base)
        assert sample.load_pixart(sample.parse_options(), *where) == expected


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    sample.main()


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_pixart):
    """A finished run with adapters that do something, and the same as one file elsewhere."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_run(folder, tiny_pixart)
    (folder / "finished.json").write_text(json.dumps({"prompts": ["a chest"], "max_token_length": 60}))
    shutil.copytree(folder / "transformer_lora", folder / "checkpoint-5" / "transformer_lora")
    lora.export(folder, folder.parent / "one.safetensors")
    return folder


def test_a_run_its_file_and_its_merged_model_draw_the_same(monkeypatch, tmp_path, run, tiny_pixart, capsys):
    shared = ["--num-images", 1, "--num-inference-steps", 2, "--seed", 3]
    file, merged = run.parent / "one.safetensors", tmp_path / "merged"
    call(monkeypatch, "--lora", run, "--merge", merged)
    assert f"from_pretrained({str(merged)!r})" in capsys.readouterr().out
    with pytest.raises(UserError, match="not an empty folder"):
        call(monkeypatch, "--lora", run, "--merge", merged)
    drawn = {}
    for name, source in {
        "run": ["--lora", run],
        "file": ["--lora", file, "--prompt", "a chest"],
        "merged": ["--model", merged, "--prompt", "a chest"],
        "off": ["--lora", run, "--lora-scale", 0],
        "base": ["--model", tiny_pixart, "--prompt", "a chest"],
    }.items():
        call(monkeypatch, *source, *shared, "--out", tmp_path / name)
        drawn[name] = np.asarray(Image.open(tmp_path / name / "000000.png")).astype(int)
    assert (drawn["run"] == drawn["file"]).all() and (drawn["off"] == drawn["base"]).all()
    assert abs(drawn["run"] - drawn["merged"]).max() <= 1 < abs(drawn["run"] - drawn["base"]).max()


def test_images_table_and_grid(monkeypatch, tmp_path, tiny_pixart, capsys):
    out, prompts = tmp_path / "out", tmp_path / "prompts.txt"
    prompts.write_text("a chest\n\nnormal lungs\n")
    shared = ["--model", tiny_pixart, "--prompts", prompts, "--num-images", 2, "--num-inference-steps", 2]
    call(monkeypatch, *shared, "--seed", 5, "--out", out)
    assert "PixArt, because" in capsys.readouterr().out
    with open(out / "samples.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["text"], row["seed"]) for row in rows] == [
        ("a chest", "5"), ("a chest", "6"), ("normal lungs", "5"), ("normal lungs", "6"),
    ]  # fmt: skip
    assert all(Image.open(out / row["file_name"]).size == (32, 32) for row in rows)
    assert Image.open(out / "grid.png").width > 64
    with pytest.raises(UserError, match="holds samples already"):
        call(monkeypatch, *shared, "--out", out)
    call(monkeypatch, *shared, "--seed", 6, "--num-images", 1, "--out", tmp_path / "again")
    assert (tmp_path / "again" / "000000.png").read_bytes() == (out / "000001.png").read_bytes()


@pytest.mark.parametrize(("source", "prompts", "tokens"), [
    (".", ["a chest"], 60), ("checkpoint-5", ["a chest"], 60), ("../one.safetensors", sample.NANO_PROMPTS, 120),
])  # fmt: skip
def test_a_run_gives_its_prompts_and_their_length(monkeypatch, tmp_path, run, source, prompts, tokens):
    def draw(_, texts, *__, max_token_length, **___):
        assert (texts, max_token_length) == (prompts, tokens)
        return iter(torch.zeros(len(texts), 32, 32, 3, dtype=torch.uint8))

    monkeypatch.setattr(sample, "sample_images", draw)
    call(monkeypatch, "--lora", run / source, "--num-images", 1, "--out", tmp_path / "out")


def test_prompts_that_are_not_utf8_are_named(monkeypatch, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("Röntgen".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8"):
        call(monkeypatch, "--prompts", file, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-images", 0], "at least 1"),
        (["--prompts", "/no/such/file"], "is no file"),
        (["--lora", "/no/such/lora", "--prompt", "x"], "no LoRA in"),
        (["--ckpt", "/no/such/file.pt"], "does not exist"),
        (["--model", "DiT-B/4"], "no weights of DiT-B/4 are published"),
        (["--model", "DiT-XL/2", "--image-size", "384x640"], "is not square"),
        (["--merge", "x"], "nothing to merge"),
    ],
)
def test_user_errors(monkeypatch, tmp_path, arguments, message):
    monkeypatch.setattr(sample, "DEFAULT_RUN", tmp_path)
    with pytest.raises(UserError, match=message):
        call(monkeypatch, *arguments, "--out", tmp_path / "out")


def test_a_size_that_does_not_fit_is_named(monkeypatch, tmp_path, tiny_pixart):
    with pytest.raises(UserError, match="multiple of 16"):
        call(monkeypatch, "--model", tiny_pixart, "--image-size", 36, "--out", tmp_path / "out")


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    """A checkpoint as train.py writes it, of three named classes at 32 px."""
    torch.manual_seed(0)
    model = DiT_models["DiT-S/4"](input_size=4, num_classes=3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    args = {"model": "DiT-S/4", "image_size": 32, "num_classes": 3, "class_names": ["normal lungs", "bacterial", "x"]}
    file = tmp_path_factory.mktemp("dit") / "0000010.pt"
    torch.save({"model": {}, "ema": model.state_dict(), "opt": {}, "args": args}, file)
    return file


def test_dit(monkeypatch, tmp_path, dit, tiny_pixart):
    shared = ["--ckpt", dit, "--vae", tiny_pixart, "--num-sampling-steps", 3, "--seed", 1]
    call(monkeypatch, *shared, "--out", tmp_path / "all")
    with open(tmp_path / "all" / "samples.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["label"], row["name"], row["seed"]) for row in rows] == [
        ("0", "normal lungs", "1"), ("1", "bacterial", "1"), ("2", "x", "1"),
    ]  # fmt: skip
    assert all(Image.open(tmp_path / "all" / row["file_name"]).size == (32, 32) for row in rows)
    assert Image.open(tmp_path / "all" / "grid.png").width > 4 * 32
    named = ["--model", "DiT-S/4", "--image-size", 32, "--num-classes", 3, "--class-labels", "Normal lungs", 1]
    call(monkeypatch, *shared, *named, "--out", tmp_path / "some")
    for name in ("000000.png", "000001.png"):
        assert (tmp_path / "some" / name).read_bytes() == (tmp_path / "all" / name).read_bytes()
    call(monkeypatch, *shared, "--class-labels", 1, "--num-images", 2, "--sampler", "dpm++", "--out", tmp_path / "two")
    assert len([*(tmp_path / "two").glob("0*.png")]) == 2
    for arguments, message in (
        (["--class-labels", "cat"], "no class 'cat'; give a number from 0 to 2 or a name: normal lungs, bacterial, x"),
        (["--num-classes", 1000], "knows 3 classes, not 1000"),
        (["--image-size", 256], "trained at 32 pixels, not 256"),
        (["--model", "DiT-S/8"], "is no DiT-S/8"),
        (["--vae", "/no/such/vae"], "cannot load the VAE"),
        (["--num-sampling-steps", 1], "choose 2 to 1000"),
    ):
        with pytest.raises(UserError, match=message):
            call(monkeypatch, *shared, *arguments, "--out", tmp_path / "wrong")


def test_the_seeds_command_fetches_the_published_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(sample, "DEFAULT_RUN", tmp_path)
    monkeypatch.setattr(dit_checkpoint.fetch, "__defaults__", (tmp_path, (tmp_path / "none").as_uri() + "/"))
    with pytest.raises(UserError, match=r"cannot fetch .*DiT-XL-2-512x512.pt .* put it at .*DiT-XL-2-512x512.pt"):
        call(monkeypatch, "--image-size", 512, "--seed", 1, "--out", tmp_path / "out")
