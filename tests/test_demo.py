"""The demo's figures: they are zero for the real images themselves and grow with a tint."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nano"))
import demo
import recipe

from medart_core import options
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
    arguments = recipe.arguments(Path("out"), steps=5, seed=1, no_hldf=True)
    opts = options.parse(MedArtOptions, None, arguments)
    assert opts.no_hldf and opts.cache_latents and (opts.max_train_steps, opts.seed) == (5, 1)


def test_the_demo_makes_enough_hldf_updates():
    assert len(range(0, demo.STEPS, recipe.OPTIONS["N_steps"])) >= 40
