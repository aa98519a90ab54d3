"""Images, metadata, crops and the stream of batches (medart_core/images.py, metadata.py and data.py)."""

import csv
import errno
import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from medart_core import images
from medart_core.data import CaptionDataset, Example, ImageTransform, ShuffledBatches, collate, load_examples
from medart_core.errors import UserError, exit_codes
from medart_core.images import open_image
from medart_core.metadata import read_metadata
from medart_core.seeds import generator

XRAYS = Path(__file__).parent / "data"


def draw(path: Path, colour=(200, 30, 90), size=(8, 6), mode="RGB", **options) -> Path:
    Image.new(mode, size, colour).save(path, **options)
    return path


def folder_with(tmp_path: Path, text: str | bytes, images=("a.png", "b.png"), name="metadata.csv") -> Path:
    for image in images:
        draw(tmp_path / image)
    (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return tmp_path


def complaint(call, *arguments, **options) -> str:
    """The message of the UserError that the call must raise; it must be one line."""
    with pytest.raises(UserError) as raised:
        call(*arguments, **options)
    message = str(raised.value)
    assert "\n" not in message
    return message


# --- open_image ---


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    levels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    Image.fromarray(levels).save(tmp_path / "deep.tif")
    for name in ("deep.png", "deep.tif"):
        assert np.asarray(open_image(tmp_path / name)).tolist() == [[[v] * 3 for v in (0, 1, 128, 255)]]


def test_a_dark_16_bit_image_stays_dark(tmp_path):
    Image.fromarray(np.full((2, 2), 200, dtype=np.uint16)).save(tmp_path / "dark.png")
    assert np.asarray(open_image(tmp_path / "dark.png")).max() == 1


def test_float_images_count_from_0_to_1(tmp_path):
    Image.fromarray(np.array([[0.0, 0.2, 1.0]], dtype=np.float32)).save(tmp_path / "float.tif")
    assert np.asarray(open_image(tmp_path / "float.tif"))[0, :, 0].tolist() == [0, 51, 255]
    for number, bad in enumerate((1.5, -0.1, float("nan"))):
        Image.fromarray(np.full((1, 1), bad, dtype=np.float32)).save(tmp_path / f"{number}.tif")
        assert "grey levels outside of 0 to 1" in complaint(open_image, tmp_path / f"{number}.tif")


def test_cmyk_palette_and_alpha(tmp_path):
    draw(tmp_path / "cmyk.jpg", (0, 255, 255, 0), mode="CMYK", quality=100)
    red, green, blue = np.asarray(open_image(tmp_path / "cmyk.jpg"))[0, 0].tolist()
    assert red > 230 and green < 25 and blue < 25
    draw(tmp_path / "alpha.png", (255, 255, 255, 0), mode="RGBA")
    assert np.asarray(open_image(tmp_path / "alpha.png")).max() == 0  # transparent white on black
    draw(tmp_path / "half.png", (200, 128), mode="LA")
    assert np.asarray(open_image(tmp_path / "half.png"))[0, 0].tolist() == [100, 100, 100]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "palette.png")
    assert np.asarray(open_image(tmp_path / "palette.png"))[0, 0].tolist() == [10, 20, 30]
    palette.save(tmp_path / "clear.png", transparency=1)
    assert np.asarray(open_image(tmp_path / "clear.png")).max() == 0


def test_exif_rotation_is_applied(tmp_path):
    pixels = np.zeros((4, 8, 3), dtype=np.uint8)
    pixels[:, :4] = 255  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees: left becomes top
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    upright = np.asarray(open_image(tmp_path / "turned.png"))
    assert upright.shape == (8, 4, 3) and upright[:4].min() == 255 and upright[4:].max() == 0


def test_damaged_files_are_named(tmp_path):
    whole = (XRAYS / "IM-0029-0001.jpeg").read_bytes()
    png = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(png, "PNG")
    damaged = {
        "short.jpeg": whole[:-300],
        "short.png": png.getvalue()[:500],
        "empty.png": b"",
        "text.jpg": b"no image",
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        message = complaint(open_image, tmp_path / name)
        assert name in message and "cannot be read as an image" in message


def test_too_large_an_image_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 47)
    assert "8 x 6 pixels; shrink it" in complaint(open_image, draw(tmp_path / "large.png"))
    monkeypatch.setattr(images, "MAX_PIXELS", 48)
    assert open_image(tmp_path / "large.png").size == (8, 6)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # where Pillow itself refuses
    assert "large.png" in complaint(open_image, tmp_path / "large.png")


def test_a_file_object_is_reported_by_the_name_given():
    assert complaint(open_image, io.BytesIO(b"nothing"), "row 7").startswith("row 7 cannot be read")


# --- Metadata ---


def test_csv_with_bom_crlf_quotes_commas_and_newlines(tmp_path):
    text = '\ufefffile_name,text\r\na.png,"one, ""two"",\nthree"\r\nb.png,für\r\n'
    assert read_metadata(folder_with(tmp_path, text)) == [("a.png", 'one, "two",\nthree'), ("b.png", "für")]


@pytest.mark.parametrize(
    "caption", ["\u05e8\u05d9\u05d0\u05d5\u05ea \u0631\u0626\u0629", "\U0001fac1\u200d\u2695\ufe0f", "a\u2028b\u0085c"]
)
def test_captions_of_any_script_are_kept_exactly(tmp_path, caption):
    text = f"file_name,text\na.png,{caption}\nb.png,x\n"
    assert read_metadata(folder_with(tmp_path, text)) == [("a.png", caption), ("b.png", "x")]


def test_jsonl_and_another_column(tmp_path):
    rows = [{"file_name": "b.png", "long": "b\u2028c"}, {"file_name": "a.png", "long": "a"}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    folder = folder_with(tmp_path, text, name="metadata.jsonl")
    assert read_metadata(folder, "long") == [("b.png", "b\u2028c"), ("a.png", "a")]


def test_none_in_place_of_a_column_gives_empty_captions(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,words\n")
    assert read_metadata(tmp_path, "none") == [("a.png", "")]
    (tmp_path / "metadata.csv").write_text("file_name,text\nb.png,words\n")
    with pytest.raises(UserError, match=r"'b.png' does not exist"):
        read_metadata(tmp_path, "none")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["has no rows"]),
        ("file_name,text\n", ["has no rows"]),
        ("file_name,caption\na.png,x\n", ["no column 'text'", "file_name, caption", "--caption_column"]),
        ("name,text\na.png,x\n", ["no column 'file_name'", "name, text"]),
        ("file_name,text,text\na.png,x,y\n", ["more than one column 'text'"]),
        ("file_name,text\na.png,x\nc.png,y\n", ["line 3", "'c.png' does not exist"]),
        ("file_name,text\na.png,x\n./a.png,y\n", ["line 3", "'./a.png' was already in line 2"]),
        ("file_name,text\na.png, \n", ["line 2", "the caption of 'a.png' is empty"]),
        ("file_name,text\na.png\n", ["line 2", "the caption of 'a.png' is empty"]),
        ("file_name,text\n,x\n", ["line 2", "file_name is ''"]),
        ("file_name,text\n.,x\n", ["'.' does not exist"]),
        ("file_name,text\na.png,red, round\n", ["line 2", "into double quotes"]),
        ('file_name,text\na.png,"open\nb.png,x\n', ["cannot be read", "UTF-8"]),
        ("file_name,text\na.png,é\n".encode("latin-1"), ["cannot be read", "UTF-8"]),
        ("file_name,text\na.png,x\n".encode("utf-16"), ["cannot be read", "UTF-8"]),
        ("file_name,text\na\0.png,x\n", ["relative to"]),
        ("file_name,text\n" + "a" * 5000 + ",x\n", ["line 2", "does not exist"]),
        ('file_name,text\n"c\nd.png",x\n', [r"'c\nd.png' does not exist"]),
        ("file_name,text\nc.png,x\nd.png,x\ne.png,x\na.png,x\n", ["line 2", "'c.png'", "(and 2 more like it)"]),
    ],
)
def test_faulty_csv_is_one_line_with_place_and_remedy(tmp_path, text, words):
    message = complaint(read_metadata, folder_with(tmp_path, text))
    assert str(tmp_path / "metadata.csv") in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "text", ['{"file_name": "a.png", "text": "x"', '["a.png", "x"]', '{"file_name": 3, "text": "x"}']
)
def test_faulty_jsonl(tmp_path, text):
    assert "metadata.jsonl" in complaint(read_metadata, folder_with(tmp_path, text, name="metadata.jsonl"))


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_without_permission(tmp_path, monkeypatch, name):
    folder_with(tmp_path, "file_name,text\na.png,x\n", name=name)

    def refuse(path, *_, **__):  # for the super-user, too, whom no mode of the file stops
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(Path, "read_text", refuse)
    assert f"{tmp_path / name} cannot be opened (Permission denied)" in complaint(read_metadata, tmp_path)


def test_paths_that_leave_the_folder_are_refused(tmp_path):
    outside = draw(tmp_path / "outside.png")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "link.png").symlink_to(outside)
    (folder / "up").symlink_to(tmp_path)
    inside = draw(folder / "a.png")
    for name in ("../outside.png", "link.png", "up/outside.png", str(outside), str(inside), "up/set/../outside.png"):
        with open(folder / "metadata.csv", "w", newline="") as file:
            csv.writer(file).writerows([("file_name", "text"), (name, "x")])
        message = complaint(read_metadata, folder)
        assert "leads out of" in message and name in message


def test_no_metadata_and_no_folder(tmp_path):
    assert "has no metadata.csv; make a set with prepare.py" in complaint(load_examples, str(tmp_path))
    assert "does not exist" in complaint(load_examples, str(tmp_path / "nowhere"))
    assert "does not exist" in complaint(load_examples, "dataset/nowhere/train")


# --- load_examples ---


def test_the_bundled_x_rays_load_and_a_subset_is_drawn_by_the_seed():
    examples = load_examples(str(XRAYS), show_progress=False)
    assert len(examples) == 12 and {example.open().size for example in examples} == {(96, 96)}
    assert examples[0].caption == "A chest X-ray image of normal lungs"
    subsets = [load_examples(str(XRAYS), max_samples=5, seed=seed, show_progress=False) for seed in (0, 0, 1)]
    assert subsets[0] == subsets[1] != subsets[2] and len(subsets[0]) == 5
    assert subsets[0] == [example for example in examples if example in subsets[0]]  # in the file's order


def test_preflight_decodes_every_image_and_counts_the_bad(tmp_path):
    names = ["a.png", "b.png", "c.png", "long.png"]
    folder = folder_with(tmp_path, "file_name,text\n" + "".join(f"{name},x\n" for name in names), images=names)
    assert len(load_examples(str(folder), show_progress=False)) == 4
    for name in ("b.png", "c.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:50])
    message = complaint(load_examples, str(folder), show_progress=False)
    assert str(folder / "b.png") in message and "(and 1 more like it)" in message
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "c.png").write_bytes((folder / "a.png").read_bytes())
    draw(folder / "long.png", size=(51, 1))
    assert "51 x 1 pixels" in complaint(load_examples, str(folder), show_progress=False)


def test_a_hub_data_set_is_decoded_by_open_image(monkeypatch):
    import datasets

    deep = io.BytesIO()
    Image.fromarray(np.full((4, 4), 32896, dtype=np.uint16)).save(deep, "PNG")
    features = datasets.Features({"picture": datasets.Image(), "text": datasets.Value("string")})
    rows = {"picture": [{"bytes": deep.getvalue(), "path": None}] * 2, "text": ["one", "two"]}
    table = datasets.Dataset.from_dict(rows, features=features)
    asked = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: asked.update(options, name=name) or table)
    examples = load_examples("someone/something", "text", "picture", "v2", "cache", show_progress=False)
    assert asked == {"name": "someone/something", "split": "train", "revision": "v2", "cache_dir": "cache"}
    assert [example.caption for example in examples] == ["one", "two"]
    assert np.asarray(examples[1].open()).max() == 128 and examples[1].open().size == (4, 4)
    assert "picture, text" in complaint(load_examples, "someone/something", "text", "image")
    assert "holds no images" in complaint(load_examples, "someone/something", "text", "text")


def test_a_hub_data_set_that_cannot_be_had_is_one_line(monkeypatch):
    import datasets

    def offline(name, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    message = complaint(load_examples, "someone/something")
    assert "someone/something" in message and "no route" in message and "give its folder" in message


# --- Crops ---


def gradient(width: int, height: int) -> Image.Image:
    """Red is the column, green the row."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))


def test_transform_scales_the_short_side_and_crops():
    pixels = ImageTransform(8, center_crop=True)(gradient(20, 8))
    assert pixels.shape == (3, 8, 8) and pixels.dtype == torch.float32
    levels = (pixels + 1) * 127.5
    assert levels[0, 0].tolist() == pytest.approx(range(6, 14)) and levels[1, :, 0].tolist() == pytest.approx(range(8))
    assert ImageTransform(8)(gradient(31, 57), generator(0)).shape == (3, 8, 8)
    assert ImageTransform(64)(gradient(9, 10), generator(0)).shape == (3, 64, 64)


def test_shrinking_is_antialiased():
    stripes = Image.fromarray((np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)).convert("RGB")
    assert ImageTransform(16, center_crop=True)(stripes).abs().max() < 0.1  # an even grey, no moire


def test_pixel_values_span_minus_one_to_one():
    black_and_white = Image.fromarray(np.array([[[0] * 3, [255] * 3]] * 2, dtype=np.uint8))
    pixels = ImageTransform(2, center_crop=True)(black_and_white)
    assert pixels.min() == -1 and pixels.max() == 1


def test_random_crops_reach_both_ends_and_flips_mirror():
    lefts = [ImageTransform(8)(gradient(11, 8), generator(draw))[0, 0, 0] for draw in range(60)]
    assert sorted({round(float((left + 1) * 127.5)) for left in lefts}) == [0, 1, 2, 3]
    plain = ImageTransform(8)(gradient(8, 8), generator(0))
    flipped = [ImageTransform(8, random_flip=True)(gradient(8, 8), generator(draw)) for draw in range(40)]
    mirrored = [torch.equal(pixels, plain.flip(-1)) for pixels in flipped]
    assert 10 < sum(mirrored) < 30
    assert all(torch.equal(pixels, plain) for pixels, other in zip(flipped, mirrored, strict=True) if not other)


def test_is_fixed():
    assert ImageTransform(8).is_fixed((5, 5)) and not ImageTransform(8).is_fixed((5, 6))
    assert ImageTransform(8, center_crop=True).is_fixed((5, 6))
    assert not ImageTransform(8, center_crop=True, random_flip=True).is_fixed((5, 5))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_the_upright_image_decides_what_is_fixed(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # 8 x 4 pixels in the file, upright 4 x 8
    turned = Example(draw(tmp_path / f"turned.{suffix}", size=(8, 4), exif=exif), "x", "turned")
    assert CaptionDataset([turned], ImageTransform((8, 4)), 0).is_fixed()
    assert not CaptionDataset([turned], ImageTransform((4, 8)), 0).is_fixed()


# --- The data set and its stream ---


@pytest.fixture
def oblongs(tmp_path) -> list[Example]:
    rng = np.random.default_rng(0)
    for name in "abcde":
        Image.fromarray(rng.integers(0, 255, (12, 20, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    return [Example(tmp_path / f"{name}.png", f"caption {name}", f"{name}.png") for name in "abcde"]


def test_an_image_depends_on_seed_epoch_and_index_only(oblongs):
    transform = ImageTransform(8, random_flip=True)
    one, other = CaptionDataset(oblongs, transform, seed=3), CaptionDataset(oblongs, transform, seed=3)
    torch.manual_seed(99)
    keys = [(epoch, index) for epoch in range(6) for index in range(5)]
    first = {key: one[key]["pixel_values"] for key in keys}
    assert all(torch.equal(first[key], other[key]["pixel_values"]) for key in reversed(keys))
    assert len({tuple(first[epoch, 0].flatten().tolist()) for epoch in range(6)}) > 1  # crops change with the epoch
    changed = CaptionDataset(oblongs, transform, seed=4)
    assert any(not torch.equal(first[key], changed[key]["pixel_values"]) for key in keys)
    assert not one.is_fixed() and CaptionDataset(oblongs, ImageTransform(8, center_crop=True), 0).is_fixed()
    assert not CaptionDataset(oblongs, ImageTransform(8), 0).is_fixed()


def batches(count: int, *arguments, **options) -> list[list[tuple[int, int]]]:
    return list(itertools.islice(ShuffledBatches(*arguments, **options), count))


def test_every_epoch_is_a_permutation_of_its_own():
    keys = list(itertools.chain(*batches(21, 7, 3, seed=0)))
    epochs = [keys[start : start + 7] for start in range(0, 63, 7)]
    for number, epoch in enumerate(epochs):
        assert {key[0] for key in epoch} == {number}
        assert sorted(key[1] for key in epoch) == list(range(7))
    assert len({tuple(index for _, index in epoch) for epoch in epochs}) > 5
    assert batches(21, 7, 3, seed=1) != batches(21, 7, 3, seed=0)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_stream_goes_on_as_if_uninterrupted(num_processes):
    for rank in range(num_processes):
        whole = batches(30, 7, 3, 5, rank=rank, num_processes=num_processes)
        for first in (1, 2, 7, 13):
            resumed = batches(30 - first, 7, 3, 5, first, rank=rank, num_processes=num_processes)
            assert resumed == whole[first:]


def test_processes_share_out_the_batch_of_one():
    whole = batches(10, 11, 6, seed=2)
    shares = [batches(10, 11, 2, seed=2, rank=rank, num_processes=3) for rank in range(3)]
    assert [list(itertools.chain(*parts)) for parts in zip(*shares, strict=True)] == whole


def test_a_batch_may_be_larger_than_the_data():
    [keys] = batches(1, 3, 8, seed=0)
    assert [epoch for epoch, _ in keys] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_loader_gives_the_same_batches_with_and_without_workers(oblongs):
    dataset = CaptionDataset(oblongs, ImageTransform(8, random_flip=True), seed=1)
    loaded = []
    for workers in (0, 1):
        loader = DataLoader(dataset, batch_sampler=ShuffledBatches(5, 2, 1), collate_fn=collate, num_workers=workers)
        loaded.append(list(itertools.islice(loader, 4)))
    for plain, parallel in zip(*loaded, strict=True):
        assert plain["pixel_values"].shape == (2, 3, 8, 8)
        assert torch.equal(plain["pixel_values"], parallel["pixel_values"])
        assert plain["captions"] == parallel["captions"] == [oblongs[index].caption for _, index in plain["keys"]]
        assert plain["keys"] == parallel["keys"]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_went_missing_is_one_line_from_a_worker_too(tmp_path, capsys, workers):
    dataset = CaptionDataset([Example(tmp_path / "gone.png", "x", "gone")], ImageTransform(8), 0)
    with pytest.raises(SystemExit, match="2"), exit_codes():
        next(iter(DataLoader(dataset, batch_sampler=[[(0, 0)]], collate_fn=collate, num_workers=workers)))
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'gone.png'} cannot be read as an image")
