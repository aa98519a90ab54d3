"""The ablation's machinery: which drawn images count, what a finished row is, how a row reaches the scripts."""

import csv
import json
import sys
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "nano"))

import ablation  # noqa: E402
from ablation_data import balanced_numbers, copy_evenly, digest, list_samples, write_table  # noqa: E402
from ablation_recipes import dit, lora  # noqa: E402
from ablation_rows import COLOUR, PLAN, ROWS, Row  # noqa: E402

from medart_core.dit_options import DiTOptions  # noqa: E402
from medart_core.errors import UserError  # noqa: E402
from medart_core.medart_options import MedArtOptions  # noqa: E402


@pytest.fixture
def prepared(tmp_path):
    for split in ("train", "prompts"):
        (tmp_path / split).mkdir()
        found = [{"file_name": f"{n}.png", "text": "a patch", "label": "ab"[n % 2]} for n in range(5)]
        write_table(tmp_path / split / "raw.csv", found)
        for line in found:
            (tmp_path / split / line["file_name"]).write_bytes(line["label"].encode())
    return tmp_path


def test_rows_differ_from_med_art_in_what_they_say():
    assert len(set(PLAN)) == len(PLAN)
    for row in PLAN:
        whole = row._replace(name="med-art").options
        changed = {name for name, value in row.options.items() if whole.get(name) != value}
        assert row.name == "dit" or changed == set(ROWS[row.name])
        known = {each.name for each in fields(DiTOptions if row.name == "dit" else MedArtOptions)}
        assert {name.replace("-", "_") for name in row.options} <= known


def test_every_run_has_40_updates_with_hldf():
    for row in PLAN:
        if row.name not in ("dit", "without-hldf"):
            assert len(range(0, ablation.STEPS, row.options["N_steps"])) >= 40


def test_as_many_balanced_images_count_as_there_are_prompts_of_a_class():
    assert balanced_numbers(["b", "a", "b", "b"], ["a", "b", "c"]) == [1, 0, 4, 7]


def test_images_are_copied_evenly_and_told_apart(prepared):
    copy_evenly(prepared / "train", prepared / "some", 3)
    with open(prepared / "some" / "raw.csv", newline="") as file:
        assert [line["file_name"] for line in csv.DictReader(file)] == ["0.png", "2.png", "4.png"]
    before = digest(prepared / "some")
    (prepared / "some" / ".lock").touch()
    (prepared / "some" / "captions.jsonl").write_text("attempts")
    assert digest(prepared / "some") == before
    (prepared / "some" / "2.png").write_bytes(b"other")
    assert digest(prepared / "some") != before


def test_only_prompts_that_ask_for_a_class_have_one(prepared):
    recipes = {name: lora(Row(COLOUR, name, 0), Path("run"), prepared, 7) for name in ("med-art", "empty-caption")}
    assert recipes["med-art"].labels == list("ababa")
    assert recipes["empty-caption"].labels is None
    assert "--caption-column=none" in recipes["empty-caption"].draw
    drawn = dit(Row(COLOUR, "dit", 3), Path("run"), prepared, Path("features"), 7)
    assert drawn.numbers == [0, 1, 2, 3, 4]
    assert {"--max-steps=7", "--global-seed=3"} <= set(drawn.train)
    list_samples(prepared, drawn.numbers, drawn.labels)
    assert (prepared / "metadata.csv").read_text().splitlines()[:2] == ["file_name,label", "000000.png,a"]
    list_samples(prepared, [4], None)
    assert (prepared / "metadata.csv").read_text().split() == ["file_name", "000004.png"]


def test_a_finished_row_is_taken_and_one_of_other_options_refused(tmp_path):
    row = Row(COLOUR, "med-art", 0)
    work = ablation.Ablation(tmp_path / "results", tmp_path / "runs", 7, 20)
    assert not work.finished(row)
    work.record(row).parent.mkdir(parents=True)
    work.record(row).write_text(json.dumps(work.asked(row)))
    assert work.attempt(row) == (row, ablation.FINISHED)
    other = ablation.Ablation(tmp_path / "results", tmp_path / "runs", 8, 20)
    with pytest.raises(UserError, match="another steps"):
        other.finished(row)
