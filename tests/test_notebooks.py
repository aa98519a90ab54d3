"""The notebooks run from top to bottom, and what is committed of their last run is small and names no machine."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from forked_runs import script_exit_codes
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


@pytest.fixture
def cells(tmp_path, x_rays):
    """The cells of a notebook for twelve X-rays, mirrored for the test split, and without a DiT from before."""
    for split in ("train", "test"):
        (tmp_path / "set" / split).mkdir(parents=True)
        shutil.copy(x_rays / "metadata.csv", tmp_path / "set" / split / "raw.csv")
        for file in x_rays.glob("*.jpeg"):
            image = Image.open(file)
            (ImageOps.mirror(image) if split == "test" else image).save(tmp_path / "set" / split / file.name)
    places = {'"dataset/chest-xray"': repr(str(tmp_path / "set")), 'Path("results': f'Path("{tmp_path}'}

    def changed(name: str, changes: dict[str, str]) -> list[dict]:
        content = json.loads((ROOT / name).read_text("utf-8"))
        found = []
        for cell in content["cells"]:
            cell["source"] = "".join(cell["source"])
            for old, new in (places | changes).items():
                found += [old] if old in cell["source"] else []
                cell["source"] = cell["source"].replace(old, new)
        assert set(found) == set(places | changes)
        return content["cells"]

    return changed


@pytest.mark.parametrize(("name", "shorter"), [(NOTEBOOKS[0], (", 32, 20", ", 12, 4")), (NOTEBOOKS[1], ("=60", "=4"))])
def test_runs_from_top_to_bottom(name, shorter, cells, tmp_path, monkeypatch):
    """Cell by cell, with fewer steps, and the scripts forked instead of started."""
    shown = pytest.importorskip("IPython.display")
    pictures, scripts = [], []
    monkeypatch.setattr(shown, "display", pictures.append)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(script, *words):
        scripts.append(script)
        log = tmp_path / f"log-{len(scripts)}"
        codes = script_exit_codes(Path(script).stem, [str(word) for word in words], log)
        assert codes == [0], Path(f"{log}.0").read_text()[-2000:]

    names: dict = {}
    for cell in cells(name, dict([shorter])):
        if cell["cell_type"] == "code":
            exec(compile(cell["source"], name, "exec"), names)
            names |= {"run": run} if "run" in names else {}
    assert len(pictures) >= 4 and {"sample.py", "sample_ddp.py"} < set(scripts)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs_in_jupyter(name, cells):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / name, 4)
    for cell, changed in zip(notebook.cells, cells(name, {}), strict=True):
        cell.source = changed["source"]
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) >= 4
