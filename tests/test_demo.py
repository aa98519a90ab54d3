"""The demo's figures: they are zero for the real images themselves and grow with a tint."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nano"))
import demo
import recipe

from medart_core import checkpoint, options
from medart_core.errors import UserError
from medart_core.medart_options import MedArtOptions


@pytest.fixture
def real():
    grey = torch.rand(3, 5, 1, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.5
    return grey.expand(-1, -1, 3, -1, -1)


def test_color_errors(real):
    assert demo.color_errors(real, real) == {"color_distance": 0, "chroma_error": 0}
    tinted = real.clone()
    tinted[:, :, 0] += 0.2
    errors = demo.color_errors(tinted, real)
    assert errors["color_distance"] == pytest.approx(0.2, rel=1e-4)
    assert errors["chroma_error"] == pytest.approx(0.2, rel=1e-4)


def test_picture_has_a_row_for_each_model_and_columns_for_each_class(real):
    sheet = demo.picture(["a", "b", "c"], {"real": real, "base": real}, columns=2)
    assert sheet.width > 6 * 128 and 2 * 128 < sheet.height < 3 * 128 + 60


def test_summary_gives_mean_and_range_over_seeds(tmp_path, capsys):
    for seed, value in enumerate((1.0, 2.0, 6.0)):
        errors = {row: {"color_distance": value, "chroma_error": 2 * value} for row in demo.ROWS[1:]}
        (tmp_path / f"seed-{seed}").mkdir()
        (tmp_path / f"seed-{seed}" / "demo.json").write_text(json.dumps({"seed": seed, "steps": 9, "errors": errors}))
    demo.summary(tmp_path)
    result = json.loads((tmp_path / "summary.json").read_text())
    assert result["errors"]["base"]["chroma_error"] == {"mean": 6, "low": 2, "high": 12}
    with pytest.raises(UserError, match=r"run python nano/demo\.py"):
        demo.summary(tmp_path / "nothing")


def test_the_recipe_is_one_that_medart_takes():
    wanted = recipe.OPTIONS | {"max_train_steps": 5, "seed": 1, "no_hldf": True}
    arguments = recipe.arguments(Path("out"), wanted)
    opts = options.parse(MedArtOptions, None, arguments)
    assert opts.no_hldf and opts.cache_latents and (opts.max_train_steps, opts.seed) == (5, 1)


def test_the_demo_makes_enough_hldf_updates():
    assert len(range(0, demo.STEPS, recipe.OPTIONS["N_steps"])) >= 40


def test_a_finished_run_is_taken_only_if_it_is_the_one_asked_for(tmp_path, monkeypatch, capsys):
    commands = []

    def medart(command):
        commands.append(command)
        opts = options.parse(MedArtOptions, None, command[2:])
        tmp_path.joinpath("options.json").write_text(json.dumps(dataclasses.asdict(opts)))
        checkpoint.finish(tmp_path, opts.max_train_steps or 0, prompts=[])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", medart)
    for _ in range(2):
        recipe.finetune(tmp_path, steps=5, seed=0)
    assert len(commands) == 1 and f"{tmp_path} is finished already" in capsys.readouterr().out
    for changes, difference in (
        ({"seed": 1}, "seed 0 -> 1"),
        ({"steps": 6}, "max_train_steps 5 -> 6"),
        ({"no_hldf": True}, "no_hldf False -> True"),
    ):
        with pytest.raises(UserError, match=rf"another finished run \({difference}\); move it away"):
            recipe.finetune(tmp_path, **{"steps": 5, "seed": 0, **changes})
    medart(["python", "medart.py", "--no_hldf", f"--output_dir={tmp_path}"])  # a run of somebody's own
    with pytest.raises(UserError, match=r"no_hldf True -> False, .*train_batch_size"):
        recipe.finetune(tmp_path, steps=5, seed=0)
