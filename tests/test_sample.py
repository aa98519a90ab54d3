"""sample.py: the printed rule of families, and the files that it writes."""

import csv
import json
import sys

import pytest
from PIL import Image

import sample
from medart_core.errors import UserError


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
    [([], "finished run"), (["--image-size", "512"], "finished run"), (["--image-size", "256"], "DiT-XL/2")],
)
def test_a_finished_run_of_the_asked_size_comes_first(monkeypatch, tmp_path, arguments, expected):
    (tmp_path / "finished.json").write_text("{}")
    (tmp_path / "options.json").write_text(json.dumps({"resolution": 512}))
    assert expected in family(monkeypatch, tmp_path, *arguments)[1]


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    sample.main()


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-images", 0], "at least 1"),
        (["--prompts", "/no/such/file"], "does not exist"),
        (["--lora", "/no/such/lora", "--prompt", "x"], "no LoRA in"),
        (["--image-size", 512], "not part of this version"),
    ],
)
def test_user_errors(monkeypatch, tmp_path, arguments, message):
    monkeypatch.setattr(sample, "DEFAULT_RUN", tmp_path)
    with pytest.raises(UserError, match=message):
        call(monkeypatch, *arguments, "--out", tmp_path / "out")


def test_a_size_that_does_not_fit_is_named(monkeypatch, tmp_path, tiny_pixart):
    with pytest.raises(UserError, match="multiple of 16"):
        call(monkeypatch, "--model", tiny_pixart, "--image-size", 36, "--out", tmp_path / "out")
