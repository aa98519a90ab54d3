"""sample_ddp.py: the same images at any number of processes, archives as ADM reads them, restarts and failures."""

import csv
import errno
import json
import os
import signal
import sys
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_runs import enter, fork_ranks
from PIL import Image

import sample_ddp
from medart_core import dit_sampling, lora_layers, pretrained, sampling
from medart_core.errors import UserError, exit_codes
from medart_core.image_npz import THERE, ImageNpz, rows_of
from medart_core.many_samples import runs
from models import DiT

NAME = "DiT-S-2-0000010-size-32-vae-pixart-cfg-1.5-seed-0"


def read_as_adm(archive: Path) -> np.ndarray:
    """The way of ADM's evaluator: through the zip's stream, header first, then a number of rows at a time."""
    with zipfile.ZipFile(archive) as content, content.open("arr_0.npy") as array:
        assert np.lib.format.read_magic(array) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(array)
        assert not fortran and dtype == np.uint8 and len(shape) == 4 and shape[3] == 3
        row, rows = int(np.prod(shape[1:])), []
        while len(rows) < shape[0]:
            rows.append(np.frombuffer(array.read(row), np.uint8).reshape(shape[1:]))
        assert array.read() == b""  # here the checksum is compared
    return np.stack(rows)


# --- The archive ---


def fill(folder: Path, count: int, side: int = 8) -> tuple[Path, torch.Tensor]:
    folder.mkdir(exist_ok=True)
    images = torch.randint(256, (count, side, side, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    npz = ImageNpz(folder, (count, side, side, 3))
    npz.begin()
    for start in reversed(range(0, count, 4)):
        npz.write(start, images[start : start + 4])
    npz.publish(folder / "images.npz")
    return folder / "images.npz", images


def test_archive(tmp_path):
    archive, images = fill(tmp_path, 10)
    assert (read_as_adm(archive) == images.numpy()).all()
    with np.load(archive) as content:
        assert content.files == ["arr_0"] and (content["arr_0"] == images.numpy()).all()
    with zipfile.ZipFile(archive) as content:
        assert content.testzip() is None
    assert rows_of(archive) == 10
    assert [path.name for path in tmp_path.iterdir()] == ["images.npz"]
    assert fill(tmp_path / "again", 10)[0].read_bytes() == archive.read_bytes()


def test_archive_that_is_none(tmp_path):
    archive, _ = fill(tmp_path, 10)
    for content in (b"", b"x" * 500, archive.read_bytes()[:-30]):
        archive.write_bytes(content)
        assert rows_of(archive) == 0
    assert rows_of(tmp_path / "none.npz") == 0


def test_rows_count_when_they_are_there(tmp_path):
    npz = ImageNpz(tmp_path, (6, 4, 4, 3))
    npz.begin()
    npz.write(2, torch.ones(2, 4, 4, 3, dtype=torch.uint8))
    npz.begin()  # by the next run: nothing is lost
    assert npz.missing() == [0, 1, 4, 5]
    npz.write(0, torch.zeros(2, 4, 4, 3, dtype=torch.uint8))
    npz.write(4, torch.zeros(2, 4, 4, 3, dtype=torch.uint8))
    with pytest.raises(OSError, match="not empty"):
        npz.publish(tmp_path)  # interrupted behind the checksum
    npz.publish(tmp_path / "a.npz")
    assert read_as_adm(tmp_path / "a.npz").sum() == 2 * 4 * 4 * 3
    npz.begin()
    npz.write(1, torch.ones(3, 4, 4, 3, dtype=torch.uint8))
    with open(npz.part, "r+b") as file:  # as if row 2 had not come to the disk
        file.seek(npz.start + 2 * npz.row_bytes + 5)
        file.write(b"\0")
    npz.begin()
    assert npz.missing() == [0, 2, 4, 5]
    longer = ImageNpz(tmp_path, (7, 4, 4, 3))
    longer.begin()
    assert longer.missing() == [0, 2, 4, 5, 6]
    for row in longer.missing():
        longer.write(row, torch.zeros(1, 4, 4, 3, dtype=torch.uint8))
    longer.publish(tmp_path / "b.npz")
    assert read_as_adm(tmp_path / "b.npz").sum(axis=(1, 2, 3)).tolist() == [0, 48, 0, 48, 0, 0, 0]
    npz.begin()
    npz.write(0, torch.ones(6, 4, 4, 3, dtype=torch.uint8))
    other = ImageNpz(tmp_path, (6, 4, 8, 3))
    other.begin()  # images of another size are none
    assert other.missing() == [*range(6)]


def test_memory_is_flat_in_the_number_of_images(tmp_path):
    peaks = []
    images = torch.zeros(50, 64, 64, 3, dtype=torch.uint8)
    for count in (1000, 4000):  # 12 and 49 MB
        npz = ImageNpz(tmp_path, (count, 64, 64, 3))
        tracemalloc.start()
        npz.begin()
        for start in range(0, count, 50):
            npz.write(start, images)
        npz.publish(tmp_path / "a.npz")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (tmp_path / "a.npz").stat().st_size > count * 64 * 64 * 3
    assert peaks[1] - peaks[0] < 200_000 and peaks[1] < 20_000_000


@pytest.mark.slow
def test_archive_beyond_4_gib(tmp_path):
    shape = (6000, 512, 512, 3)  # sparse: takes no space
    npz = ImageNpz(tmp_path, shape)
    npz.begin()
    np.full(6000, zlib.crc32(bytes(npz.row_bytes)) + THERE, np.uint64).tofile(npz.journal)  # black images
    last = torch.full((1, 512, 512, 3), 7, dtype=torch.uint8)
    npz.write(5999, last)
    npz.publish(tmp_path / "a.npz")
    assert rows_of(tmp_path / "a.npz") == 6000
    with zipfile.ZipFile(tmp_path / "a.npz") as content:
        assert content.testzip() is None  # reads all of it
        with content.open("arr_0.npy") as array:
            array.seek(128 + 5999 * 512 * 512 * 3)
            assert array.read() == last.numpy().tobytes()


def test_runs():
    assert runs([], 3) == []
    assert runs([1, 2, 3, 4, 8, 10, 11], 3) == [range(1, 4), range(4, 5), range(8, 9), range(10, 12)]


# --- The script ---


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny DiT of three classes at 32 px, as train.py saves it; its name is that of a larger one."""
    torch.manual_seed(0)
    model = tiny_dit(input_size=4, num_classes=3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    args = {"model": "DiT-S/2", "image_size": 32, "num_classes": 3, "class_names": ["a", "b", "c"]}
    file = tmp_path_factory.mktemp("dit") / "0000010.pt"
    torch.save({"ema": model.state_dict(), "args": args}, file)
    return file


def tiny_dit(**shape) -> DiT:
    return DiT(hidden_size=32, depth=2, num_heads=2, **shape)


@pytest.fixture(scope="module")
def arguments(checkpoint, tiny_pixart) -> list[str]:
    return [
        "--ckpt", str(checkpoint), "--vae", str(tiny_pixart), "--num-fid-samples", "10", "--per-proc-batch-size", "4",
        "--num-sampling-steps", "3",
    ]  # fmt: skip


def call(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["sample_ddp.py", *map(str, arguments)])
    monkeypatch.setitem(sample_ddp.DiT_models, "DiT-S/2", tiny_dit)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    sample_ddp.main()


def forked(environment: dict[str, str], file: str, arguments: list[str], failing_at: int | None, killed=False) -> None:
    """sample_ddp.py as one of several processes, which may fail or be killed at one of its images."""
    enter(environment, file, ["sample_ddp.py", *arguments])
    sample_ddp.DiT_models["DiT-S/2"] = tiny_dit
    real = dit_sampling.sample_images

    def failing(model, vae, labels, numbers, **settings):
        if failing_at in numbers:
            if killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise UserError(f"image {failing_at} cannot be drawn; do something")
        return real(model, vae, labels, numbers, **settings)

    dit_sampling.sample_images = failing
    with exit_codes():
        sample_ddp.main()
    os._exit(0)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, arguments) -> Path:
    """What one process makes without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as monkeypatch:
        call(monkeypatch, *arguments, "--sample-dir", folder)
    return folder


def test_what_one_process_makes(whole):
    assert {path.name for path in whole.iterdir()} == {NAME, f"{NAME}.npz", f"{NAME}.csv", f"{NAME}.json"}
    assert sorted(path.name for path in (whole / NAME).iterdir()) == [f"{n:06d}.png" for n in range(10)]
    images = read_as_adm(whole / f"{NAME}.npz")
    assert images.shape == (10, 32, 32, 3)
    for n in range(10):
        assert (np.asarray(Image.open(whole / NAME / f"{n:06d}.png")) == images[n]).all()
    with open(whole / f"{NAME}.csv", newline="") as file:
        labels = [(row["file_name"], int(row["label"]), row["name"]) for row in csv.DictReader(file)]
    expected = dit_sampling.draw_labels(10, 3, 0, balanced=False)
    assert labels == [(f"{n:06d}.png", label, "abc"[label]) for n, label in enumerate(expected)]


def test_two_processes_make_the_same_files(tmp_path, arguments, whole):
    given = [*arguments, "--sample-dir", str(tmp_path / "samples")]
    assert fork_ranks(forked, tmp_path / "log", [(given, None)] * 2) == [0, 0], (tmp_path / "log.0").read_text()
    assert files(tmp_path / "samples") == files(whole)


def test_when_one_process_fails_all_stop_and_the_rest_is_made_later(monkeypatch, tmp_path, arguments, whole):
    samples = tmp_path / "samples"
    given = [*arguments, "--sample-dir", str(samples)]
    assert fork_ranks(forked, tmp_path / "log", [(given, 5)] * 2) == [2, 2]
    logs = [(tmp_path / f"log.{rank}").read_text() for rank in range(2)]
    assert "error: image 5 cannot be drawn; do something" in logs[1]
    assert "error" not in logs[0] and "Traceback" not in "".join(logs)
    assert not [*samples.glob("*.npz")]
    assert sorted(fork_ranks(forked, tmp_path / "log", [(given, 5, True)] * 2)) == [-signal.SIGKILL, 2]
    assert not [*samples.glob("*.npz")]
    drawn = count_draws(monkeypatch)
    call(monkeypatch, *given)
    assert {4, 5, 6, 7} <= {*drawn} <= {*range(4, 10)}
    assert files(samples) == files(whole)


def count_draws(monkeypatch) -> list[int]:
    drawn, real = [], dit_sampling.sample_images
    monkeypatch.setattr(
        dit_sampling, "sample_images", lambda *given, **more: drawn.extend(given[3]) or real(*given, **more)
    )
    return drawn


def test_a_restart_makes_what_is_missing(monkeypatch, tmp_path, arguments, whole, capsys):
    given = [*arguments, "--sample-dir", tmp_path]
    drawn = count_draws(monkeypatch)
    call(monkeypatch, *given)
    drawn.clear()
    call(monkeypatch, *given)
    assert drawn == [] and "is there already" in capsys.readouterr().out
    (tmp_path / NAME / "000009.png").unlink()
    call(monkeypatch, *given)
    assert drawn == [] and files(tmp_path) == files(whole)  # the archive has it
    for name in (f"{NAME}/000009.png", f"{NAME}.npz"):
        (tmp_path / name).unlink()
    call(monkeypatch, *given)
    assert drawn == [8, 9] and files(tmp_path) == files(whole)
    drawn.clear()
    call(monkeypatch, *given, "--num-fid-samples", 13)  # the last group of ten was padded otherwise, but not made anew
    assert drawn == [8, 9, 10, 11, 12] and read_as_adm(tmp_path / f"{NAME}.npz").shape[0] == 13
    assert (read_as_adm(tmp_path / f"{NAME}.npz")[:10] == read_as_adm(whole / f"{NAME}.npz")).all()
    with pytest.raises(UserError, match=r"made otherwise \(num_steps 3 -> 4\); choose another --sample-dir"):
        call(monkeypatch, *given, "--num-sampling-steps", 4)
    (tmp_path / NAME / "000002.png").write_bytes(b"x")
    (tmp_path / f"{NAME}.npz").unlink()
    with pytest.raises(UserError, match=r"000002.png cannot be read .* remove it to have it made again"):
        call(monkeypatch, *given, "--num-fid-samples", 12)
    (tmp_path / f"{NAME}.json").unlink()
    with pytest.raises(UserError, match="of another program"):
        call(monkeypatch, *given)


def test_an_archive_alone_and_its_restart(monkeypatch, tmp_path, arguments, whole):
    given = [*arguments, "--sample-dir", tmp_path, "--no-png"]
    real, calls = dit_sampling.sample_images, []

    def interrupted(*given, **more):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dit_sampling, "sample_images", interrupted)
        call(patch, *given)
    drawn = count_draws(monkeypatch)
    call(monkeypatch, *given)
    assert drawn == [8, 9]
    assert {path.name for path in tmp_path.iterdir()} == {f"{NAME}.npz", f"{NAME}.csv", f"{NAME}.json"}
    assert (tmp_path / f"{NAME}.npz").read_bytes() == (whole / f"{NAME}.npz").read_bytes()
    with pytest.raises(UserError, match="has 10 images, 3 are asked for; choose another --sample-dir, or remove it"):
        call(monkeypatch, *given, "--num-fid-samples", 3)
    assert {path.name for path in tmp_path.iterdir()} == {f"{NAME}.npz", f"{NAME}.csv", f"{NAME}.json"}


def test_more_images_take_over_those_of_a_finished_archive(monkeypatch, tmp_path, arguments, whole):
    given, archive = [*arguments, "--sample-dir", tmp_path], tmp_path / f"{NAME}.npz"
    call(monkeypatch, *given, "--no-png")
    finished, drawn, real = archive.read_bytes(), count_draws(monkeypatch), dit_sampling.sample_images

    def interrupted(*given, **more):
        if 12 in given[3]:
            raise KeyboardInterrupt
        return real(*given, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dit_sampling, "sample_images", interrupted)
        call(patch, *given, "--no-png", "--num-fid-samples", 13)
    assert drawn == [8, 9, 10, 11] and archive.read_bytes() == finished  # stays until the larger one is whole
    call(monkeypatch, *given, "--no-png", "--num-fid-samples", 13)
    assert drawn == [8, 9, 10, 11, 12] and (read_as_adm(archive)[:10] == read_as_adm(whole / f"{NAME}.npz")).all()
    drawn.clear()
    call(monkeypatch, *given, "--num-fid-samples", 13)  # their pictures, too
    assert drawn == [] and {path.name for path in tmp_path.iterdir()} == {path.name for path in whole.iterdir()}
    assert (np.asarray(Image.open(tmp_path / NAME / "000012.png")) == read_as_adm(archive)[12]).all()
    content = bytearray(archive.read_bytes())
    content[500] ^= 1
    archive.write_bytes(content)
    with pytest.raises(UserError, match=r"npz is damaged .*; remove it to have its images made again"):
        call(monkeypatch, *given, "--no-png", "--num-fid-samples", 14)
    archive.unlink()
    call(monkeypatch, *given, "--num-fid-samples", 14)  # from the pictures
    assert drawn == [12, 13] and (read_as_adm(archive)[:10] == read_as_adm(whole / f"{NAME}.npz")).all()


def test_a_full_disk_is_said_in_one_line(monkeypatch, tmp_path, arguments):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ImageNpz, "write", full)
    with pytest.raises(UserError, match=r"cannot write in .* No space left on device\); make room and run the same"):
        call(monkeypatch, *arguments, "--sample-dir", tmp_path)
    assert not [*tmp_path.glob("*.npz")]


def test_other_batch_sizes_differ_by_a_grey_level_at_most(monkeypatch, tmp_path, arguments, whole):
    call(monkeypatch, *arguments, "--sample-dir", tmp_path, "--per-proc-batch-size", 7, "--no-png")
    ours, theirs = (read_as_adm(folder / f"{NAME}.npz").astype(int) for folder in (tmp_path, whole))
    assert abs(ours - theirs).max() <= 1


def test_balanced_labels_and_another_sampler(monkeypatch, tmp_path, arguments):
    shared = ["--sample-dir", tmp_path, "--no-png", "--num-fid-samples", 6, "--balanced", "--cfg-scale", 1]
    call(monkeypatch, *arguments, *shared, "--sampler", "ddim", "--global-seed", 3)
    with open(tmp_path / "DiT-S-2-0000010-size-32-vae-pixart-cfg-1.0-seed-3.csv", newline="") as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["0", "1", "2"] * 2


def test_pixart_with_a_lora(monkeypatch, tmp_path, tiny_pixart, x_rays):
    model = pretrained.load(tiny_pixart, torch.float32, torch.device("cpu"))
    adapted = lora_layers.attach(model.transformer, lora_layers.TRANSFORMER_TARGETS, 4, base=str(tiny_pixart))
    for parameter in lora_layers.trainable_parameters(adapted):
        torch.nn.init.normal_(parameter, std=0.2)
    lora_layers.save(adapted, tmp_path / "run" / "transformer_lora")
    shared = ["--metadata", x_rays, "--num-sampling-steps", 2, "--num-fid-samples", 14, "--per-proc-batch-size", 5]
    call(monkeypatch, "--lora", tmp_path / "run", *shared, "--sample-dir", tmp_path / "samples")
    name = "PixArt-run-size-32-cfg-4.5-seed-0"
    images = read_as_adm(tmp_path / "samples" / f"{name}.npz")
    assert images.shape == (14, 32, 32, 3) and len({image.tobytes() for image in images}) == 14
    with open(tmp_path / "samples" / f"{name}.csv", newline="") as file:
        rows = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    assert rows[12:] == rows[:2] and rows[0][1] in rows[0][0]  # twelve captions with their labels, in turn
    assert sample_ddp.read_prompts(x_rays / "metadata.csv", "text")[0] == [text for text, _ in rows[:12]]
    assert sample_ddp.read_prompts(x_rays / "metadata.csv", "label")[0] == [label for _, label in rows[:12]]
    call(monkeypatch, "--model", tiny_pixart, *shared, "--sample-dir", tmp_path / "samples", "--no-png")
    assert (read_as_adm(tmp_path / "samples" / "PixArt-base-size-32-cfg-4.5-seed-0.npz") != images).any()


def test_prompts_of_all_classes_in_turn() -> None:
    captions, labels = sampling.classes_in_turn(["a1", "a2", "a3", "b1"], ["a", "a", "a", "b"])
    assert captions == ["a1", "b1", "a2", "b1", "a3", "b1"] and labels == ["a", "b"] * 3
    with pytest.raises(UserError, match="needs the classes"):
        sampling.classes_in_turn(["a1"], [])


def test_published_defaults(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sample_ddp.py"])
    options = vars(sample_ddp.parse_options())
    expected = {
        "sample_dir": Path("samples"), "per_proc_batch_size": 32, "num_fid_samples": 50_000,
        "global_seed": 0, "tf32": True, "ckpt": None, "sampler": "ddpm",
    }  # fmt: skip
    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--num-fid-samples", 0], "at least 1"),
        (["--cfg-scale", 0.5], "at least 1, which is no guidance"),
        (["--lora", "x"], "PixArt needs prompts"),
        (["--metadata", "x"], "give its --lora or its --model"),
        (["--ckpt", "/no/such.pt"], "does not exist"),
        (["--num-classes", 1000], "knows 3 classes"),
    ],
)
def test_user_errors(monkeypatch, tmp_path, arguments, wrong, message):
    with pytest.raises(UserError, match=message):
        call(monkeypatch, *arguments, "--sample-dir", tmp_path, *wrong)
    assert not any(tmp_path.iterdir())


def test_the_record_says_what_the_name_does_not(whole):
    assert json.loads((whole / f"{NAME}.json").read_text()).keys() == {
        "model", "precision", "balanced", "vae", "sampler", "num_steps", "guided_channels",
    }  # fmt: skip
