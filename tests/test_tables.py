"""The tables of README and docs are what results/ says, and the rule for what counts is as it is written down."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "nano"))

import tables  # noqa: E402

from medart_core.errors import UserError  # noqa: E402


def test_documents_hold_what_results_say():
    for file in tables.documents():
        text = file.read_text(encoding="utf-8")
        assert tables.rendered(text, str(file)) == text, f"{file}: run make tables"


def test_a_changed_figure_is_seen():
    text = (ROOT / "docs" / "ablation.md").read_text(encoding="utf-8")
    start = text.index("<!-- table: ablation-missing -->")
    edited = text[:start] + text[start:].replace("ows", "OWS", 1)
    assert edited != text
    assert tables.rendered(edited, "docs/ablation.md") == text


def test_every_table_stands_in_a_document_or_is_made():
    for make in tables.TABLES.values():
        assert make()
    with pytest.raises(UserError, match="'nothing'"):
        tables.rendered("<!-- table: nothing -->\n<!-- end of table -->", "README.md")


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([1.0, 1.1, 0.9], True),
        ([1.0, -0.1, 1.0], False),
        ([0.1, 0.1, 2.0], False),
        ([-1.0, -1.2], True),
        ([1.0], False),
    ],
)
def test_what_counts(differences, expected):
    assert tables.counts(differences) is expected


def test_finished_rows_say_how_they_were_made():
    for file in (ROOT / "results" / "ablation").glob("*/*.json"):
        record = json.loads(file.read_text())
        assert (
            file == ROOT / "results" / "ablation" / f"{record['set']}" / f"{record['row']}-seed-{record['seed']}.json"
        )
        for digest in (record["base_sha256"], *record["weights_sha256"].values(), *record["data_sha256"].values()):
            assert len(digest) == 64
        assert record["commit"] and record["figures"]["fid"]["value"] > 0
