"""Real collections in the layouts in which they are downloaded, and DICOM (labelled_sets, near_duplicates, dicom)."""

import csv
import io
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance

import prepare
from medart_core import near_duplicates
from medart_core.dicom import as_png
from medart_core.errors import UserError
from medart_core.labelled_sets import HAM_LABELS, KVASIR_CLASSES
from medart_core.near_duplicates import LinkedGroups, cluster, perceptual_hash


def run(*arguments: object) -> None:
    """prepare.py with these arguments, in this process."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
        prepare.main()


def complaint(*arguments: object) -> str:
    with pytest.raises(UserError) as raised:
        run(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def scene(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """A random picture, with finer detail the fainter, as in photographs: different seeds look nothing alike."""
    random, picture = np.random.default_rng(seed), np.full((size[1], size[0], 3), 128.0)
    for detail in (4, 8, 16, 32):
        coarse = Image.fromarray(random.integers(0, 256, (detail, detail, 3), dtype=np.uint8))
        picture += (np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=float) - 128) * 2.5 / detail**0.8
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def framed(image: Image.Image) -> Image.Image:
    """As an endoscope's processor draws it: black corners and a green inset, the same on every frame."""
    image, (width, height) = image.copy(), image.size
    for left, top, right, bottom in ((0, 0, 1, 8), (7, 0, 8, 8), (0, 0, 8, 1), (0, 7, 8, 8)):
        image.paste("black", (left * width // 8, top * height // 8, right * width // 8, bottom * height // 8))
    image.paste((30, 110, 60), (0, 5 * height // 8, width // 4, height))
    return image


def save(path: Path, image: Image.Image, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def rows_of(made: Path) -> dict[str, dict[str, str]]:
    """The rows of all splits by file name, each with its split."""
    rows = {}
    for table in sorted(made.glob("*/raw.csv")):
        with open(table, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                assert row["file_name"] not in rows
                rows[row["file_name"]] = {**row, "split": table.parent.name}
    return rows


# --- Near duplicates ---


def test_links_join_groups_and_keep_the_leader_of_the_other():
    groups = LinkedGroups[str]()
    groups.link("b", "a")
    groups.link("d", "c")
    assert [groups.leader(member) for member in "abcde"] == ["a", "a", "c", "c", "e"]
    groups.link("b", "d")
    assert {groups.leader(member) for member in "abcd"} == {"c"} and groups.leader("e") == "e"


def test_the_hash_survives_what_repeated_frames_differ_by():
    image = scene(0)
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=40)
    noise = np.random.default_rng(0).normal(0, 8, (80, 96, 3))
    noisy = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    alike = [Image.open(jpeg), noisy, image.resize((72, 60)), ImageEnhance.Brightness(image).enhance(0.9)]
    alike.append(image.crop((1, 1, 95, 79)))
    for other in alike:
        assert np.bitwise_count(perceptual_hash(image) ^ perceptual_hash(other)).sum() <= near_duplicates.MAX_DISTANCE
    assert cluster([image, *alike, scene(1)]) == [0] * 6 + [1]
    assert cluster([]) == []


def test_the_same_border_and_inset_over_all_frames_do_not_make_them_alike():
    assert cluster(framed(scene(seed)) for seed in range(400)) == list(range(400))
    chest = [Image.open(path) for path in sorted((Path(__file__).parent / "data").glob("*.jpeg"))]
    assert cluster(framed(image.convert("RGB")) for image in chest) == list(range(12))


def test_clusters_are_those_of_all_pairs_in_whatever_blocks(monkeypatch):
    """Against a plain search through the graph of close pairs, with chains across the borders of blocks."""
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**63, (60, 4), dtype=np.uint64)
    for place in range(30):  # a chain of neighbours, whose two bits lie in different words
        hashes[place + 1] = hashes[place]
        hashes[place + 1, [place % 4, (place + 1) % 4]] ^= np.uint64(1 << place)
    hashes = hashes[random.permutation(60)]
    close = np.bitwise_count(hashes[:, None] ^ hashes[None]).sum(axis=2) <= 2
    group = -np.ones(60, int)
    for start in range(60):
        if group[start] < 0:
            found = np.eye(60, dtype=bool)[start]
            while (wider := close[found].any(axis=0)).sum() > found.sum():
                found = wider
            group[found] = group.max() + 1
    for block in (1, 7, 1024):
        monkeypatch.setattr(near_duplicates, "BLOCK", block)
        following = iter(hashes)
        monkeypatch.setattr(near_duplicates, "perceptual_hash", lambda image, following=following: next(following))
        assert cluster([scene(0)] * 60, max_distance=2) == group.tolist()
    assert np.bincount(group).max() == 31


# --- Kvasir ---


@pytest.fixture(scope="module")
def kvasir(tmp_path_factory) -> Path:
    """The 8 folders with 10 scenes each, every other scene filmed twice; one scene is in two classes."""
    folder = tmp_path_factory.mktemp("kvasir") / "kvasir-dataset-v2"
    for number, label in enumerate(KVASIR_CLASSES):
        for place in range(10):
            image = scene(10 * number + place)
            save(folder / label / f"{place}-a.jpg", image)
            if place % 2:
                save(folder / label / f"{place}-b.jpg", ImageEnhance.Brightness(image).enhance(0.93), quality=60)
    save(folder / "polyps" / "twin.jpg", scene(0), quality=50)  # scene 0 is a dyed lifted polyp too
    return folder


def test_kvasir_keeps_near_identical_frames_in_one_split(kvasir, tmp_path, capsys):
    run("kvasir", kvasir, "--root", tmp_path)
    assert "121 images form 80 clusters of near duplicates, the largest has 2" in capsys.readouterr().out
    rows = rows_of(tmp_path / "kvasir")
    assert len(rows) == 121 and {row["split"] for row in rows.values()} == {"train", "val", "test"}
    assert rows["dyed-lifted-polyps/0-a.jpg"]["text"] == "An endoscopic image of dyed lifted polyps"
    assert rows["normal-z-line/0-a.jpg"]["label"] == "normal z-line"
    assert rows["polyps/twin.jpg"]["split"] == rows["dyed-lifted-polyps/0-a.jpg"]["split"]
    for name in (name for name in rows if name.endswith("-b.jpg")):
        assert rows[name]["split"] == rows[name.replace("-b", "-a")]["split"]


def test_kvasir_zip_is_the_same_and_a_missing_class_is_named(kvasir, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "download"), "zip", kvasir.parent)
    for source, name in ((kvasir, "one"), (archive, "other")):
        run("kvasir", source, "--root", tmp_path, "--name", name)
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "other")
    shutil.copytree(kvasir, tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "esophagitis")
    (tmp_path / "part" / "polyps").rename(tmp_path / "part" / "instruments")
    message = complaint("kvasir", tmp_path / "part", "--root", tmp_path)
    assert "missing: esophagitis, polyps, unknown: instruments" in message
    assert not (tmp_path / "kvasir").exists()


# --- ISIC 2017 ---

TRUTH = "ISIC-2017_Training_Part3_GroundTruth.csv"


@pytest.fixture
def isic(tmp_path) -> Path:
    """Images with superpixels and masks, and the table beside their folder."""
    rows = ["image_id,melanoma,seborrheic_keratosis"]
    for number in range(30):
        name = f"ISIC_{number:07}"
        save(tmp_path / "isic" / "ISIC-2017_Training_Data" / f"{name}.jpg", scene(number))
        for other in ("superpixels", "segmentation"):
            save(tmp_path / "isic" / "ISIC-2017_Training_Data" / f"{name}_{other}.png", scene(99 + number))
        rows.append(f"{name},{float(number % 3 == 0)},{float(number % 3 == 1)}")
    (tmp_path / "isic" / TRUTH).write_text("\n".join(rows) + "\n")
    return tmp_path / "isic"


def test_isic_takes_labels_from_the_table_and_no_superpixels(isic, tmp_path, capsys):
    run("isic", isic, "--root", tmp_path / "root")
    assert "a lesion may cross the split" in capsys.readouterr().out
    rows = rows_of(tmp_path / "root" / "isic")
    labels = ["melanoma", "seborrheic keratosis", "nevus"]
    assert {name: row["label"] for name, row in rows.items()} == {
        f"ISIC_{number:07}.jpg": labels[number % 3] for number in range(30)
    }
    assert rows["ISIC_0000001.jpg"]["text"] == "A dermoscopic image of seborrheic keratosis"


def test_isic_with_the_table_elsewhere_or_faulty(isic, tmp_path):
    table = (isic / TRUTH).rename(tmp_path / "truth.csv")
    assert "give it with --csv" in complaint("isic", isic, "--root", tmp_path / "root")
    assert "nowhere.csv" in complaint("isic", isic, "--csv", tmp_path / "nowhere.csv", "--root", tmp_path / "root")
    archive = shutil.make_archive(str(tmp_path / "images"), "zip", isic)
    run("isic", archive, "--csv", table, "--root", tmp_path / "root")
    assert len(rows_of(tmp_path / "root" / "isic")) == 30
    (isic / "ISIC-2017_Training_Data" / "ISIC_0000007.jpg").unlink()
    message = complaint("isic", isic, "--csv", table, "--root", tmp_path / "x")
    assert "lacks 1 of the 30 images" in message and "ISIC_0000007" in message
    for wrong in ("1.0,1.0", "yes,0"):
        table.write_text(f"image_id,melanoma,seborrheic_keratosis\nISIC_0000001,{wrong}\n")
        assert "ISIC_0000001 no known class" in complaint("isic", isic, "--csv", table, "--root", tmp_path / "x")


# --- HAM10000 ---


@pytest.fixture
def ham(tmp_path) -> Path:
    """20 lesions of 3 images, dealt over both part folders; one image is in both, as in some downloads."""
    rows = ["lesion_id,image_id,dx,dx_type,age,sex,localization"]
    codes = sorted(HAM_LABELS)
    for number in range(60):
        name, lesion = f"ISIC_{24000 + number:07}", number % 20
        save(tmp_path / "ham" / f"HAM10000_images_part_{1 + number % 2}" / f"{name}.jpg", scene(number))
        rows.append(f"HAM_{lesion:07},{name},{codes[lesion % 7]},histo,45.0,female,back")
    save(tmp_path / "ham" / "ham10000_images_part_1" / "ISIC_0024000.jpg", scene(0))
    (tmp_path / "ham" / "HAM10000_metadata.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "ham"


def test_ham10000_keeps_lesions_together(ham, tmp_path):
    run("ham10000", ham, "--root", tmp_path / "root")
    rows = rows_of(tmp_path / "root" / "ham10000")
    assert len(rows) == 60 and {row["label"] for row in rows.values()} == set(HAM_LABELS.values())
    assert rows["ISIC_0024000.jpg"]["text"] == "A dermoscopic image of actinic keratosis"
    for lesion in range(20):
        splits = {rows[f"ISIC_{24000 + number:07}.jpg"]["split"] for number in range(lesion, 60, 20)}
        assert len(splits) == 1
    assert len({row["split"] for row in rows.values()}) > 1


def test_ham10000_tables_that_are_tabbed_missing_or_faulty(ham, tmp_path):
    table = ham / "HAM10000_metadata.csv"
    tabbed = table.read_text().replace(",", "\t")
    table.unlink()
    assert "no HAM10000_metadata.csv" in complaint("ham10000", ham, "--root", tmp_path / "root")
    (ham / "HAM10000_metadata").write_text(tabbed)
    archive = shutil.make_archive(str(tmp_path / "ham"), "zip", ham)
    run("ham10000", archive, "--root", tmp_path / "root")
    assert len(rows_of(tmp_path / "root" / "ham10000")) == 60
    (ham / "HAM10000_metadata").write_text(tabbed.replace("akiec", "oops"))
    assert "oops" in complaint("ham10000", ham, "--root", tmp_path / "x")
    shutil.rmtree(ham / "HAM10000_images_part_2")
    assert "lacks 30 of the 60 images" in complaint("ham10000", ham, "--root", tmp_path / "x")


# --- DICOM ---


def dicom(values: np.ndarray, photometric: str = "MONOCHROME2", **elements: Any) -> bytes:
    """A file as pydicom writes it: 16-bit signed grey levels, or 8-bit colour."""
    pydicom = pytest.importorskip("pydicom", reason="pydicom is optional; requirements-dev.txt has it")
    from pydicom.dataset import FileMetaDataset

    file = pydicom.Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = pydicom.uid.UID("1.2.3")
    file.PatientName = "Somebody"
    file.Rows, file.Columns = values.shape[:2]
    file.SamplesPerPixel = 3 if values.ndim == 3 else 1
    file.PlanarConfiguration = 0
    file.PhotometricInterpretation = photometric
    file.BitsAllocated = file.BitsStored = values.dtype.itemsize * 8
    file.HighBit = file.BitsStored - 1
    file.PixelRepresentation = int(values.dtype.kind == "i")
    file.PixelData = values.tobytes()
    for name, value in elements.items():
        setattr(file, name, value)
    written = io.BytesIO()
    pydicom.dcmwrite(written, file, enforce_file_format=True)
    return written.getvalue()


LEVELS = np.array([[0, 100, 200, 300]], dtype=np.int16)


def grey(content: bytes) -> list[int]:
    image = Image.open(io.BytesIO(as_png(content, "scan")))
    assert image.format == "PNG" and image.mode == "RGB"
    red, green, blue = np.asarray(image).transpose(2, 0, 1)
    assert (red == green).all() and (green == blue).all()
    return red[0].tolist()


def test_dicom_levels_without_a_window_span_the_range():
    assert grey(dicom(LEVELS)) == [0, 85, 170, 255]
    assert grey(dicom(LEVELS, "MONOCHROME1")) == [255, 170, 85, 0]
    assert grey(dicom(LEVELS * 0 + 7)) == [0, 0, 0, 0]


def test_dicom_window_is_the_first_and_applies_after_rescaling():
    """PS3.3 C.11.2.1.2: black up to c - 0.5 - (w - 1) / 2, white above c - 0.5 + (w - 1) / 2, linear between."""
    ends: dict[str, Any] = {"RescaleSlope": 2, "RescaleIntercept": -100}  # -100, 100, 300, 500
    assert grey(dicom(LEVELS, WindowCenter=200.5, WindowWidth=401, **ends)) == [0, 64, 191, 255]
    assert grey(dicom(LEVELS, WindowCenter=[200.5, 0], WindowWidth=[401, 9], **ends)) == [0, 64, 191, 255]
    assert grey(dicom(LEVELS, "MONOCHROME1", WindowCenter=200.5, WindowWidth=401, **ends)) == [255, 191, 64, 0]
    assert grey(dicom(LEVELS, WindowCenter=150, WindowWidth=1)) == [0, 0, 255, 255]


def test_dicom_colour_stays_and_other_kinds_are_refused():
    colour = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    assert (np.asarray(Image.open(io.BytesIO(as_png(dicom(colour, "RGB"), "scan")))) == colour).all()
    for content in (dicom(LEVELS, "PALETTE COLOR"), dicom(LEVELS)[:-3], b"no DICOM"):
        with pytest.raises(UserError, match="scan cannot be read as a DICOM image"):
            as_png(content, "scan")


def test_folder_reads_dicom_by_suffix_and_by_content(tmp_path):
    tree = tmp_path / "scans"
    names = {"a/one.dcm": "a/one.png", "a/1.2.840.7": "a/1.2.840.7.png", "b/plain": "b/plain.png"}
    for number, name in enumerate(names):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(dicom(LEVELS + number * LEVELS**2))
    (tree / "b" / "README").write_text("no scan")
    save(tree / "b" / "photo.png", scene(0))
    archive = shutil.make_archive(str(tmp_path / "zipped"), "zip", tree)
    for source in (tree, archive):
        run("folder", source, "--root", tmp_path / "root")
        made = tmp_path / "root" / Path(source).stem
        rows = rows_of(made)
        assert set(rows) == {*names.values(), "b/photo.png"}
        content = (made / rows["a/one.png"]["split"] / "a/one.png").read_bytes()
        assert Image.open(io.BytesIO(content)).format == "PNG" and b"Somebody" not in content
    save(tree / "a" / "one.png", scene(1))
    assert "rename one of them" in complaint("folder", tree, "--root", tmp_path / "x")


def test_without_pydicom_the_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    (tmp_path / "scans" / "a").mkdir(parents=True)
    (tmp_path / "scans" / "a" / "one.dcm").write_bytes(b"never read")
    assert "pip install pydicom" in complaint("folder", tmp_path / "scans", "--root", tmp_path / "root")


# --- Memory ---


def test_images_of_a_zip_are_read_one_at_a_time(tmp_path, monkeypatch):
    """No reader is called before the pictures are written."""
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for number in range(3):
            archive.writestr(f"a/{number}.png", bytes(9))
    opened = []
    real = zipfile.ZipFile.open
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *args, **more: opened.append(1) or real(*args, **more))
    pictures = prepare.labelled_sets.class_folder(tmp_path / "images.zip", None)
    assert opened == [] and pictures[0].read() == bytes(9) and opened == [1]
