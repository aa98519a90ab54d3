"""Image sets to be measured: where images and classes come from, what is refused, and .npz files as maps."""

import csv
import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medart_core.errors import UserError
from medart_core.evaluation import images, npz


def picture(seed: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def write(folder: Path, names: list[str], first: int = 0, size: tuple[int, int] = (12, 10)) -> Path:
    for number, name in enumerate(names, start=first):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number, size).save(folder / name)
    return folder


def table(folder: Path, name: str, rows: list[dict[str, str]]) -> None:
    with open(folder / name, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_classes_come_from_a_table_or_from_folders(tmp_path: Path, x_rays: Path) -> None:
    found = images.read(x_rays, show_progress=False)
    assert len(found) == 12 and found.labels and found.texts
    assert found.classes == ["bacterial pneumonia", "normal lungs", "viral pneumonia"]
    assert [found.labels[row] for row in found.rows_of("normal lungs")] == ["normal lungs"] * 4
    tree = images.read(write(tmp_path / "tree", ["cat/0.png", "cat/1.png", "dog/0.png"]))
    assert (tree.names, tree.labels) == (("cat/0.png", "cat/1.png", "dog/0.png"), ("cat", "cat", "dog"))
    flat = images.read(write(tmp_path / "flat", ["b.png", "a.png"]))
    assert (flat.names, flat.labels, flat.texts) == (("a.png", "b.png"), None, None)


def test_samples_are_those_of_their_table_and_are_labelled_by_their_prompts(tmp_path: Path) -> None:
    write(tmp_path, ["0.png", "1.png", "grid.png"])
    prompts = ["A photo of Dyed polyps", "a photo of polyps"]
    table(tmp_path, "samples.csv", [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(prompts)])
    found = images.read(tmp_path)
    assert (found.names, found.texts, found.labels) == (("0.png", "1.png"), tuple(prompts), None)
    assert found.labelled_by_texts(["polyps", "dyed polyps"]).labels == ("dyed polyps", "polyps")
    assert found.labelled_by_texts(["dyed polyps"]).labels is None


def test_pixels_names_and_sizes(tmp_path: Path) -> None:
    found = images.read(write(tmp_path, ["0.png", "1.bmp", "2.png"]))
    np.testing.assert_array_equal(found.batch([2, 0])[0].permute(1, 2, 0), np.asarray(picture(2)))
    assert images.one_size(found) == (10, 12)
    sized = images.replace(found, size=(6, 6))
    assert sized.batch([0, 1]).shape == (2, 3, 6, 6) and sized.sha256 != found.sha256
    same = images.read(write(tmp_path / "again", ["x.bmp", "y.png", "z.png"]))  # other names and formats, same pixels
    assert same.sha256 == found.sha256 != same.take([0, 2, 1]).sha256
    assert images.first(found, 2).names == ("0.png", "2.png") and images.first(found, None) is found


def test_npz_is_read_as_a_map_and_as_the_same_images(tmp_path: Path) -> None:
    array = np.stack([np.asarray(picture(seed)) for seed in range(5)])
    np.savez(tmp_path / "plain.npz", arr_0=array, mu=np.arange(3.0))
    np.savez_compressed(tmp_path / "packed.npz", array)
    for name in ("plain", "packed"):
        found = npz.images(tmp_path / f"{name}.npz")
        assert isinstance(found, np.memmap)
        np.testing.assert_array_equal(found, array)
    np.testing.assert_array_equal(npz.read(tmp_path / "plain.npz", "mu"), [0, 1, 2])
    folder = write(tmp_path / "folder", [f"{i}.png" for i in range(5)])
    assert images.read(tmp_path / "plain.npz").sha256 == images.read(folder).sha256


def damaged_npz(path: Path, kind: str) -> Path:
    array = np.stack([np.asarray(picture(seed)) for seed in range(5)])
    if kind == "objects":
        np.savez(path, arr_0=np.array([{}, []], dtype=object))
    elif kind == "other keys":
        np.savez(path, images=array)
    elif kind == "float":
        np.savez(path, arr_0=array / 255)
    elif kind == "header says more":
        stream = io.BytesIO()
        np.lib.format.write_array(stream, array)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", stream.getvalue().replace(b"(5, 10", b"(9, 10"))
    else:
        np.savez(path, arr_0=array)
        content = bytearray(path.read_bytes())
        if kind == "bit rot":
            content[len(content) // 2] ^= 1
        path.write_bytes(content[: len(content) // 2] if kind == "cut" else content)
    return path


@pytest.mark.parametrize("kind", ["objects", "other keys", "float", "header says more", "bit rot", "cut"])
def test_damaged_npz_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match=r"file\.npz") as caught:
        images.read(damaged_npz(tmp_path / "file.npz", kind))
    assert "\n" not in str(caught.value)


def test_refusals(tmp_path: Path) -> None:
    mixed = images.read(write(write(tmp_path / "mixed", ["0.png"]), ["1.png"], size=(8, 8)))
    with pytest.raises(UserError, match=r"0\.png has 12 x 10 pixels and 1\.png 8 x 8"):
        images.one_size(mixed)
    with pytest.raises(UserError, match="holds 2 images, not the 3 asked for"):
        images.first(mixed, 3)
    (write(tmp_path / "broken", ["a.png", "b.png"]) / "b.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(UserError, match=r"b\.png cannot be read as an image"):
        images.read(tmp_path / "broken")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        images.read(tmp_path / "empty")
    with pytest.raises(UserError, match="does not exist"):
        images.read(tmp_path / "missing")
    cats = images.read(write(tmp_path / "cats", ["cat/0.png", "cow/1.png"]))
    dogs = images.read(write(tmp_path / "dogs", ["cat/7.png", "dog/2.png"], first=1))
    with pytest.raises(UserError, match=r"class 'cow', .*dogs only 'cat', 'dog'"):
        images.refuse_unknown_classes(cats, dogs)
    images.refuse_unknown_classes(dogs.take([0]), cats)
    with pytest.raises(UserError, match=r"cow/1\.png and .*cat/7\.png are the same image; mind"):
        images.refuse_overlap(cats, dogs, "mind")
    images.refuse_overlap(cats.take([0]), dogs, "mind")


def test_digest_is_of_pixels(tmp_path: Path) -> None:
    found = images.read(write(tmp_path, ["a.png"]))
    assert found.digests == (hashlib.sha256(b"10 x 12 " + picture(0).tobytes()).hexdigest(),)
