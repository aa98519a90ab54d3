"""The notebooks run from top to bottom, and what is committed of their last run is small and names no machine."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ("run_medart.ipynb", "run_DiT.ipynb")
MAX_BYTES = 300_000


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_committed(name):
    text = (ROOT / name).read_text("utf-8")
    assert len(text) < MAX_BYTES
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for output in outputs)
    assert any("image/jpeg" in output.get("data", {}) for output in outputs)
    assert re.findall(r"/(?:root|home|work|tmp)/", text) == [] and str(ROOT) not in text


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs_from_top_to_bottom(name, tmp_path, x_rays):
    """On twelve X-rays, mirrored for the test split, and without a DiT from before."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    for split in ("train", "test"):
        (tmp_path / "set" / split).mkdir(parents=True)
        shutil.copy(x_rays / "metadata.csv", tmp_path / "set" / split / "raw.csv")
        for file in x_rays.glob("*.jpeg"):
            image = Image.open(file)
            (ImageOps.mirror(image) if split == "test" else image).save(tmp_path / "set" / split / file.name)
    notebook = nbformat.read(ROOT / name, 4)
    places = {'"dataset/chest-xray"': repr(str(tmp_path / "set")), 'Path("results': f'Path("{tmp_path}'}
    found = []
    for cell in notebook.cells:
        for old, new in places.items():
            found += [old] if old in cell.source else []
            cell.source = cell.source.replace(old, new)
    assert set(found) == set(places)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) >= 4
