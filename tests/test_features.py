"""extract_features.py: the same bytes however the work is shared out, taken up after a kill, and read back right."""

import json
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_dit
import torch
from forked_runs import script_exit_codes
from PIL import Image

import extract_features
from medart_core import checkpoint, feature_store, labelled_images, latents, pretrained
from medart_core.data import center_crop_adm
from medart_core.errors import UserError
from medart_core.feature_store import FeatureStore

STORE = ("moments.npy", "labels.npy", "features.json", "manifest.json")


@pytest.fixture
def flags(tiny_pixart, x_rays):
    return [f"--vae={tiny_pixart}", f"--data-path={x_rays}", "--image-size=32", "--num-workers=0"]


@pytest.fixture
def extract(monkeypatch):
    """Run extract_features.py in this process."""
    from accelerate.state import PartialState

    def call(*arguments: str) -> None:
        PartialState._reset_state()
        monkeypatch.setattr(sys, "argv", ["extract_features.py", *arguments])
        extract_features.main()

    threads = torch.get_num_threads()
    yield call
    torch.set_num_threads(threads)


def content(folder: Path) -> dict[str, bytes]:
    assert sorted(path.name for path in folder.iterdir()) == sorted([*STORE, checkpoint.LOCK])
    return {name: (folder / name).read_bytes() for name in STORE}


def test_the_bytes_do_not_depend_on_processes_batches_or_a_kill(extract, flags, tmp_path):
    extract(*flags, f"--features-path={tmp_path / 'one'}")
    arguments = [*flags, "--batch-size=16", f"--features-path={tmp_path / 'two'}"]
    assert script_exit_codes("extract_features", arguments, tmp_path / "log", 2) == [0, 0]
    arguments = [*flags, f"--features-path={tmp_path / 'killed'}"]
    prepare = [(tiny_dit.die_while_extracting, 1)]
    assert script_exit_codes("extract_features", arguments, tmp_path / "log", 1, prepare) == [-signal.SIGKILL]
    with pytest.raises(UserError, match="is not finished: run extract_features"):
        FeatureStore(tmp_path / "killed")
    assert feature_store.Extraction(tmp_path / "killed").pending() == [1]
    assert script_exit_codes("extract_features", arguments, tmp_path / "log", 2) == [0, 0]
    assert content(tmp_path / "one") == content(tmp_path / "two") == content(tmp_path / "killed")


def test_what_is_stored_is_what_the_vae_says_of_image_and_mirror_image(extract, flags, tmp_path, tiny_pixart, x_rays):
    extract(*flags, f"--features-path={tmp_path / 'out'}")
    store, images = FeatureStore(tmp_path / "out"), labelled_images.find(x_rays)
    assert store.class_names == ["bacterial pneumonia", "normal lungs", "viral pneumonia"] and len(store) == 12
    assert store.labels.tolist() == images.labels
    vae = pretrained.load_vae(str(tiny_pixart), torch.float32, torch.device("cpu"))
    rows, mirrored = [11, 0, 3], torch.tensor([False, True, True])
    moments, labels = store.batch(rows, mirrored)
    assert moments.dtype == torch.float16 and labels.tolist() == [images.labels[row] for row in rows]
    for row, flip, found in zip(rows, mirrored, moments, strict=True):
        pixel_values = images.pixel_values(row, 32)[None]
        expected = latents.encode_moments(vae, pixel_values.flip(-1) if flip else pixel_values)[0]
        torch.testing.assert_close(found.float(), expected, atol=2e-3, rtol=2e-3)


def test_the_same_command_again_does_nothing_and_another_one_is_refused(extract, flags, tmp_path, x_rays):
    out = f"--features-path={tmp_path / 'out'}"
    extract(*flags, out)
    before = content(tmp_path / "out")
    extract(*flags, out)
    with pytest.raises(UserError, match=r"made otherwise \(image_size 32 -> 64; shape .*another --features-path"):
        extract(*flags, "--image-size=64", out)
    assert content(tmp_path / "out") == before
    with pytest.raises(UserError, match="holds other things"):
        extract(*flags, f"--features-path={shutil.copytree(x_rays, tmp_path / 'images')}")


def test_a_kill_while_publishing_is_made_up_for(extract, flags, tmp_path, monkeypatch):
    out = f"--features-path={tmp_path / 'out'}"
    monkeypatch.setattr(checkpoint, "seal", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        extract(*flags, out)
    monkeypatch.undo()
    monkeypatch.setattr(extract_features, "encode", None)  # everything is there
    extract(*flags, out)
    content(tmp_path / "out")


@pytest.mark.parametrize("name", STORE)
def test_a_missing_or_damaged_file_is_one_line(extract, flags, tmp_path, name):
    extract(*flags, f"--features-path={tmp_path / 'out'}")
    file = tmp_path / "out" / name
    whole = file.read_bytes()
    for damage in (b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(damage)
        with pytest.raises(
            UserError, match=f"{name} is missing or damaged; remove .* and extract|no readable {name}; "
        ):
            FeatureStore(tmp_path / "out")
    file.unlink()
    with pytest.raises(UserError, match=name):
        FeatureStore(tmp_path / "out")


def test_a_full_disk_is_one_line_and_the_rest_is_made_later(extract, flags, tmp_path, monkeypatch):
    out = f"--features-path={tmp_path / 'out'}"
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"No space left.*; what is done is kept: make"),
    ):
        patch.setattr(feature_store.os, "pwrite", lambda file, values, offset: len(values) - 1)
        extract(*flags, out)
    extract(*flags, out)
    assert len(FeatureStore(tmp_path / "out")) == 12


def test_an_image_that_cannot_be_read_stops_every_process_with_one_line(flags, tmp_path, x_rays):
    data = shutil.copytree(x_rays, tmp_path / "data")
    name = labelled_images.find(data).names[9]  # of the second process
    (data / name).write_bytes(b"no image")
    arguments = [*flags, f"--data-path={data}", f"--features-path={tmp_path / 'out'}"]
    assert script_exit_codes("extract_features", arguments, tmp_path / "log", 2) == [2, 2]
    said = [Path(f"{tmp_path / 'log'}.{rank}").read_text() for rank in range(2)]
    assert said[1].count("error:") == 1 and f"{name} cannot be read as an image" in said[1]
    assert "error:" not in said[0] and "Traceback" not in "".join(said)


def test_labelled_images_are_found_in_class_folders_and_in_tables(tmp_path):
    for name in ("b/2.JPEG", "b/deep/1.png", "a/x.png", "a/notes.txt", ".hidden/y.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = labelled_images.find(tmp_path)
    assert (found.names, found.labels) == (["a/x.png", "b/2.JPEG", "b/deep/1.png"], [0, 1, 1])
    (tmp_path / "metadata.csv").write_text("file_name,text,label\nb/2.JPEG,long,z\na/x.png,long,y\n")
    found = labelled_images.find(tmp_path)
    assert (found.names, found.labels, found.class_names) == (["b/2.JPEG", "a/x.png"], [1, 0], ["y", "z"])
    digest = found.digest()
    (tmp_path / "a/x.png").write_text("other")
    assert labelled_images.find(tmp_path).digest() != digest


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no images in class folders"),
        ({"train/a.png": "", "val/b.png": ""}, "is a set of splits; give one of them"),
        ({"a.png": "", "raw.csv": "file_name,label\na.png,\n"}, "line 2: the label of 'a.png' is empty"),
        ({"a.png": "", "raw.csv": "file_name,text\na.png,x\n"}, "no column 'label'"),
    ],
)
def test_folders_without_classes_are_refused(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        labelled_images.find(tmp_path)


def test_the_crop_halves_by_averaging_before_it_scales():
    values = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    crop = np.asarray(center_crop_adm(Image.fromarray(values), 16), dtype=int)
    means = values[:, 8:72].reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
    assert crop.shape == (16, 16, 3) and np.abs(crop - means).max() < 2  # rounded twice
    assert center_crop_adm(Image.new("RGB", (47, 31)), 16).size == (16, 16)
    upright = Image.fromarray(np.repeat(np.arange(48, dtype=np.uint8)[:, None], 32, axis=1)).convert("RGB")
    assert np.asarray(center_crop_adm(upright, 32))[:, 0, 0].tolist() == list(range(8, 40))


def test_json_facts_name_what_train_needs(extract, flags, tmp_path):
    extract(*flags, f"--features-path={tmp_path / 'out'}", "--model=DiT-XL/2", "--global-batch-size=256")
    facts = json.loads((tmp_path / "out" / "features.json").read_text())
    assert facts["image_size"] == 32 and facts["shape"] == [12, 2, 2, 4, 4, 4] and facts["scaling_factor"] > 0
