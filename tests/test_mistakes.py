"""Mistakes that newcomers make: each ends on one clear line, the one that docs/troubleshooting.md shows."""

import errno
import importlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from forked_runs import exit_codes, start_script
from PIL import Image
from test_lora import write_run

from medart_core import errors
from models import DiT_models

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"


class Mistake(NamedTuple):
    """A row of the page's table: FOLDER stands for `place`."""

    title: str
    command: str
    printed: str  # ... for what differs from machine to machine
    code: int


def read_table() -> list[Mistake]:
    rows = re.findall(r"^\| ([^|]+) \| `([^`]+)` \| `(.+)` \| (\d+) \|$", PAGE.read_text("utf-8"), flags=re.MULTILINE)
    return [Mistake(title, command, printed, int(code)) for title, command, printed, code in rows]


def small_disk(limit: int) -> None:
    """No file can grow beyond so many bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def launch_with(precision: str) -> None:
    """What accelerate's launcher tells a script."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = precision


def offline() -> None:
    """As HF_HUB_OFFLINE=1, which is read when the library is imported: before a process is forked."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True


def without_token() -> None:
    """As if nobody had ever logged in to the hub."""
    from huggingface_hub import constants

    os.environ.pop("HF_TOKEN", None)
    constants.HF_TOKEN_PATH = os.devnull


def without_hub() -> None:
    """Logged in, and the hub out of reach."""
    from huggingface_hub import constants

    os.environ["HF_TOKEN"] = "hf_x"
    constants.ENDPOINT = "http://127.0.0.1:9"


def without_gpu() -> None:
    """A machine without a GPU, whatever this one has."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def interrupt_in(module: str, name: str) -> None:
    """Where the work is done sooner than a signal comes: Ctrl-C as Python sees it, in a function."""

    def interrupted(*_arguments: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    setattr(importlib.import_module(module), name, interrupted)


MISTAKES = {mistake.title: mistake for mistake in read_table()}
BEFORE: dict[str, tuple] = {
    "a full disk while training": (small_disk, 20_000),
    "a full disk while preparing": (small_disk, 2_000),
    "fp16, in which T5 overflows": (launch_with, "fp16"),
    "a model from the hub without a network": (offline,),
    "endoscopy without a GPU": (without_gpu,),
    "sharing without a token of the hub": (without_token,),
    "sharing without a network": (without_hub,),
    "a full disk while sharing": (small_disk, 2_000),
}
STAGES: dict[str, str | tuple[str, str]] = {  # what to wait for, or where the interruption comes from
    "training": r"medart: +0%\|[^|]*\| [1-9]",
    "describing": r" [1-9]/12 ",
    "training DiT": r"DiT-S/8: +0%\|[^|]*\| [1-9]",
    "sampling": r"sampling: +0%",
    "sampling many": r"sampling: +0%",
    "preparing": ("medart_core.prepared", "_write_split"),
    "encoding": ("extract_features", "encode"),
    "measuring": ("evaluate", "read_sets"),
}
# Too many for the page: the command, and what is printed after `error: `.
OTHERS = r"""
medart.py --dataset_name FOLDER/set --validation_data_dir FOLDER/gone
    --validation_data_dir FOLDER/gone is no folder; correct its name, or leave it out
medart.py --dataset_name FOLDER/set --output_dir FOLDER/new --resume_from_checkpoint FOLDER/set
    FOLDER/set has no readable manifest.json; leave --resume_from_checkpoint out
VSG.py --data-dir FOLDER/gone
    the folder FOLDER/gone does not exist; check --data-dir, or make the folder with prepare.py
prepare.py folder FOLDER/classes --group-pattern [
    --group-pattern '[' is no regular expression (...); give one such as 'person(\d+)'
extract_features.py --data-path FOLDER/set --num-workers -1
    --num-workers is -1; give at least 0
sample.py --prompts FOLDER/gone
    FOLDER/gone is no file; give a text file with one prompt per line
sample.py --prompts FOLDER/samples/samples.csv
    FOLDER/samples/samples.csv holds no prompts; write one per line
sample.py --prompt x --image-size 0
    --image-size is 0; give a side such as 256
sample.py --prompt x --out FOLDER/64.npz
    FOLDER/64.npz is a file; choose another --out
sample.py --prompt x --num-images 1 --out /proc/x
    cannot write in /proc/x (...); remove what is there: ...
sample.py --lora nano/lora-chest-xray --merge /proc/x
    cannot write in /proc/x (...); remove what is there: ...
sample_ddp.py --image-size 0
    --image-size is 0; give a side such as 256
evaluate.py --generated FOLDER/64.npz --real FOLDER/set --out FOLDER/64.npz
    FOLDER/64.npz is a file; choose another --out
evaluate.py --generated FOLDER/64.npz --real FOLDER/set --utility-seeds -1
    --utility-seeds is -1; give at least 0
evaluate.py fit-extractor --train FOLDER/classes --out x --epochs 0
    --epochs is 0; give at least 1
share.py FOLDER/lora --push_to_hub a/b/c --dry_run
    --push_to_hub is a/b/c; give USER/NAME
share.py FOLDER/lora --out FOLDER/no-picture --grid FOLDER/64.npz
    FOLDER/64.npz cannot be read as an image (...); replace it or take it out of the data
"""
IMPORTING = ("prepare.py", "VSG.py", "medart.py", "sample.py", "sample_ddp.py", "extract_features.py", "train.py",
             "evaluate.py", "share.py", "nano/demo.py")  # fmt: skip
LONG = ("describing", "training DiT", "sampling many")
FOR_SPEED = {  # before the arguments of the table, which count as they come last
    "medart": "--pretrained_model_name_or_path {tiny} --report_to none --num_validation_images 0 --M_times 1 "
    "--max_train_steps 1 --output_dir {place}/new",
    "VSG": "--picture {place}/captions.png",
    "train": "--model DiT-S/8",
    "sample": "--out {place}/new-samples",
    "sample_ddp": "--sample-dir {place}/new-samples",
    "share": "--out {place}/new-share",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, x_rays, tiny_pixart) -> Path:
    """What the commands are given; its path has spaces."""
    folder = tmp_path_factory.mktemp("my files")
    images = sorted(x_rays.glob("*.jpeg"))

    def make_set(name: str, rows: list[str], encoding: str = "utf-8", header: str = "file_name,text") -> Path:
        (folder / name).mkdir()
        for image in images:
            shutil.copy(image, folder / name)
        (folder / name / "metadata.csv").write_bytes("\r\n".join([header, *rows, ""]).encode(encoding))
        return folder / name

    shutil.copytree(x_rays, folder / "set")
    shutil.copy(folder / "set" / "metadata.csv", folder / "set" / "raw.csv")
    (make_set("bare", []) / "metadata.csv").unlink()
    make_set("semicolons", [f"{image.name};a chest X-ray" for image in images], header="file_name;text")
    make_set("commas", [f"{image.name},a chest X-ray, hazy" for image in images])
    make_set("latin", [f"{image.name},Röntgenbild" for image in images], "latin-1")
    make_set("missing", [f"{image.name},a chest X-ray" for image in images] + ["gone.jpeg,a chest X-ray"])
    unreadable = make_set("unreadable", [f"{image.name},a chest X-ray" for image in images])
    (unreadable / images[3].name).write_bytes(images[3].read_bytes()[:600])
    endoscopy = make_set("endoscopy", [f"{image.name},An endoscopic image of polyps" for image in images])
    (endoscopy / "metadata.csv").rename(endoscopy / "raw.csv")
    for number, image in enumerate(images):
        (folder / "classes" / f"class-{number % 2}").mkdir(parents=True, exist_ok=True)
        shutil.copy(image, folder / "classes" / f"class-{number % 2}")
    shutil.make_archive(str(folder / "whole"), "zip", folder / "classes")
    half(folder / "whole.zip", folder / "half.zip")

    shutil.copytree(tiny_pixart, folder / "half-model")
    [weights] = (folder / "half-model" / "transformer").glob("*.safetensors")
    half(weights, weights)
    write_run(folder / "lora", tiny_pixart)
    half(folder / "lora" / "transformer_lora" / "adapter_model.safetensors", folder / "half.safetensors")
    from safetensors.torch import save_file

    save_file(
        {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.ones(4, 4)}, folder / "sd.safetensors"
    )
    model = DiT_models["DiT-S/8"](input_size=8, num_classes=3)
    args = {"model": "DiT-S/8", "image_size": 64, "num_classes": 3, "class_names": ["a", "b", "lungs"], "vae": "nano"}
    torch.save({"ema": model.state_dict(), "args": args}, folder / "dit.pt")
    half(folder / "dit.pt", folder / "half.pt")
    for side in (32, 64):
        np.savez(folder / f"{side}.npz", arr_0=np.zeros((4, side, side, 3), np.uint8))
    (folder / "mixed").mkdir()
    for side in (32, 64):
        Image.new("RGB", (side, side)).save(folder / "mixed" / f"{side}.png")
    (folder / "samples").mkdir()
    (folder / "samples" / "samples.csv").touch()
    np.savez(folder / "empty.npz", labels=np.zeros(4))
    finish = "python medart.py --dataset_name FOLDER/set --output_dir FOLDER/finished"
    assert call(finish, folder, tiny_pixart)[0] == 0, (folder / "log.0").read_text()
    return folder


def half(source: Path, target: Path) -> None:
    content = source.read_bytes()
    target.write_bytes(content[: len(content) // 2])


def start(command: str, place: Path, tiny: Path, before: tuple | None = None, log: str = "log") -> list[Any]:
    """Start a command of the page; what it says is in `place`/`log`.0."""
    script, *given = command.partition(".py")[0].split()[-1:] + command.partition(".py")[2].split()
    arguments = [word.format(tiny=tiny, place=place) for word in FOR_SPEED.get(script, "").split()]
    if script == "medart" and "--learning_rat" not in given:
        arguments += ["--resolution", "32"]
    arguments += [word.replace("FOLDER", str(place)) for word in given]
    return start_script(script, arguments, place / log, 1, [before] if before else [])


def said_in(place: Path, log: str = "log") -> str:
    said = (place / f"{log}.0").read_text("utf-8", "replace")
    return said.replace(str(place), "FOLDER").replace(str(ROOT), "ROOT").strip()


def call(command: str, place: Path, tiny: Path, before: tuple | None = None) -> tuple[int, str]:
    [code] = exit_codes(start(command, place, tiny, before))
    return code, said_in(place)


def test_the_page_has_all_of_them() -> None:
    stages = {f"Ctrl-C while {what}" for what in STAGES}
    assert len(MISTAKES) == 56 and stages | set(BEFORE) <= set(MISTAKES) and set(LONG) <= set(STAGES)


def check(mistake: Mistake, code: int, said: str) -> None:
    assert "Traceback" not in said, said
    pattern = ".*".join(map(re.escape, mistake.printed.split("...")))
    lines = re.split(r"[\r\n]+", said)
    lines = lines if mistake.code == 130 else lines[-1:]  # at the very end bars may say how far they came
    assert code == mistake.code and any(re.fullmatch(pattern, line) for line in lines), said


@pytest.mark.parametrize("title", [title for title in MISTAKES if "Ctrl-C" not in title and "two runs" not in title])
def test_mistake(title, place, tiny_pixart):
    check(MISTAKES[title], *call(MISTAKES[title].command, place, tiny_pixart, BEFORE.get(title)))


@pytest.mark.parametrize(("command", "printed"), re.findall(r"^(\S.*)\n    (.+)$", OTHERS, flags=re.MULTILINE))
def test_other_mistake(command, printed, place, tiny_pixart):
    check(Mistake("", command, f"error: {printed}", 2), *call(command, place, tiny_pixart))


def wait_for(pattern: str, place: Path, log: str) -> None:
    until = time.monotonic() + 200
    while not re.search(pattern, said_in(place, log)):
        assert time.monotonic() < until, said_in(place, log)
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("what", "sign"),
    [pytest.param(*stage, marks=pytest.mark.slow if stage[0] in LONG else ()) for stage in STAGES.items()],
)
def test_interruption(what, sign, place, tiny_pixart):
    """At each stage; and a second run finds the folder taken."""
    mistake, log = MISTAKES[f"Ctrl-C while {what}"], f"log of {what}"
    (place / f"{log}.0").touch()
    before = (interrupt_in, *sign) if isinstance(sign, tuple) else None
    started = start(mistake.command, place, tiny_pixart, before, log)
    if isinstance(sign, str):
        wait_for(sign, place, log)
        if what == "training":
            other = MISTAKES["two runs in one folder at once"]
            check(other, *call(other.command, place, tiny_pixart))
        os.kill(started[0].pid, signal.SIGINT)
    [code] = exit_codes(started)
    check(mistake, code, said_in(place, log))
    if what == "preparing":
        assert not any((place / "prepared").iterdir())


def test_no_mistakes(place, tiny_pixart, monkeypatch):
    """A BOM, Windows line ends, a path with a space, another working directory, a set that is prepared already."""
    table = place / "set" / "metadata.csv"
    monkeypatch.chdir(place)
    content = table.read_text("utf-8").splitlines()
    table.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*content, ""]).encode())
    command = "python medart.py --dataset_name FOLDER/set --output_dir FOLDER/windows"
    assert call(command, place, tiny_pixart)[0] == 0, said_in(place)
    prepare = "python prepare.py folder FOLDER/classes --root FOLDER/twice"
    code, said = call(prepare, place, tiny_pixart)
    assert code == 0 and re.findall(r"/(\w+: \d+) images", said) == ["train: 8", "val: 2", "test: 2"], said
    code, said = call(prepare, place, tiny_pixart)
    assert code == 0 and "is already prepared" in said, said


@pytest.mark.parametrize("script", IMPORTING)
def test_ctrl_c_while_the_libraries_load(script, tmp_path):
    """Before there is any of our code to catch it, but for the first import."""
    for name in ("torch", "numpy", "huggingface_hub"):
        (tmp_path / f"{name}.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, ROOT / script],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background jobs ignore
    )
    assert process.stdout and process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert said.split() == ["interrupted"] and process.returncode == -signal.SIGINT


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has a capacity"), "2 GiB;"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\nmore"), "you tried;"),
        (MemoryError(), "out of memory;"),
        (OSError(errno.ENOSPC, "No space left on device", "here"), "here: No space left on device;"),
    ],
)  # fmt: skip
def test_memory_and_disks_are_told_wherever_they_end(error, words, capsys):
    with pytest.raises(SystemExit, match="2"), errors.exit_codes():
        raise error
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line


def test_faults_of_the_program_keep_their_traceback():
    for error in (RuntimeError("shapes differ"), OSError(errno.ENOENT, "gone", "here"), AssertionError()):
        with pytest.raises(type(error)), errors.exit_codes():
            raise error
