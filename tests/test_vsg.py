"""VSG.py with a captioner that needs no model: the loop, its journal, what it refuses, and what it never loses."""

import csv
import http.server
import json
import random
import resource
import shutil
import signal
import struct
import sys
import threading
import time
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import datasets
import fake_captioner
import numpy as np
import pytest
from forked_runs import exit_codes, script_exit_codes, start_script
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig

import VSG
from llava_next_captioner.engines import Answer, CaptionerError
from llava_next_captioner.random_weights import byte_processor, random_model
from medart_core import captioners, captioning, errors, journal, training_data
from medart_core.metadata import read_metadata
from medart_core.pictures import caption_sheet, image_grid
from medart_core.vsg_options import VSGOptions

LABELS = ("normal lungs", "bacterial pneumonia", "viral pneumonia")
HOSTILE = 'a "quoted", comma\nline\r\nlone\rreturn \u202eright-to-left\u202c שלום 😀 \u2028 nul \0 end'


def write_table(file: Path, rows: list[dict]) -> None:
    with open(file, "w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, list(rows[0]), quoting=csv.QUOTE_ALL)
        table.writeheader()
        table.writerows(rows)


def read(file: Path) -> list[dict]:
    with open(file, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream, strict=True))


def make_set(folder: Path, count: int = 12, **columns) -> Path:
    """`count` small images with raw.csv, not in the order of their names; `columns` replace those of every row."""
    folder.mkdir(parents=True)
    rows = []
    for number in reversed(range(count)):
        name, label = f"{number:02d}.png", LABELS[number % 3]
        Image.new("RGB", (12, 8), (number * 20, 90, 90)).save(folder / name)
        rows.append({"file_name": name, "text": f"A chest X-ray image of {label}", "label": label} | columns)
    write_table(folder / "raw.csv", rows)
    return folder


def as_prepared(folder: Path) -> None:
    """The metadata.csv that prepare.py writes."""
    rows = read(folder / "raw.csv")
    write_table(folder / "metadata.csv", [row | {"simple_text": row["text"]} for row in rows])


def flags(folder: Path, *more: str) -> list[str]:
    return [f"--data-dir={folder}", "--batch-size=4", f"--picture={folder.parent / 'captions.png'}", *more]


@pytest.fixture
def vsg(monkeypatch, capsys):
    """Run VSG.py in this process: its exit code and what it said; `calls` is where the fake notes (image, attempt)."""

    def run(folder: Path, *more: str, **fake) -> tuple[int, str]:
        with monkeypatch.context() as patched:
            if fake.pop("real", None) is None:
                patched.setattr(VSG, "build_engine", lambda opts, *_: fake_captioner.FakeEngine(opts.seed, **fake))
            patched.setattr(sys, "argv", ["VSG.py", *flags(folder, *more)])
            with pytest.raises(SystemExit) as ended, errors.exit_codes(CaptionerError):
                sys.exit(VSG.main())
        said = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return code, said.out + said.err

    return run


def entries(folder: Path) -> list[dict]:
    lines = (folder / "captions.jsonl").read_text().splitlines()
    return [item for item in map(json.loads, lines) if "file_name" in item]


# --- The loop ---


def test_a_set_is_described(vsg, tmp_path) -> None:
    folder, calls = make_set(tmp_path / "train"), tmp_path / "calls"
    as_prepared(folder)
    code, said = vsg(folder, calls=calls)
    assert code == 0 and "12 images: " in said and "attempts were rejected (" in said and "worst: " in said
    simple = {row["file_name"]: row for row in read(folder / "raw.csv")}
    rows = read(folder / "metadata.csv")
    assert [*rows[0]] == ["file_name", "text", "simple_text", "label"]
    assert [row["file_name"] for row in rows] == list(simple)  # as raw.csv has them
    for row in rows:
        assert (
            row["text"].startswith(row["simple_text"] + ", ")
            and row["simple_text"] == simple[row["file_name"]]["text"]
        )
        assert row["label"] == simple[row["file_name"]]["label"]
    assert Image.open(tmp_path / "captions.png").width > 1000

    items = entries(folder)
    assert [item["file_name"] for item in items] == sorted(simple)
    assert [item["chunk"] for item in items] == [0] * 4 + [1] * 4 + [2] * 4
    drawn = Counter(line.split()[0] for line in calls.read_text().splitlines())
    for item in items:
        attempts = item["attempts"]
        assert [a["attempt"] for a in attempts] == list(range(len(attempts))) and len(attempts) <= 5
        assert all(a["failed"] for a in attempts[:-1])  # none is drawn after a good one
        assert drawn[item["file_name"]] == len(attempts)
        assert (item["seed"], item["model"]) == (0, "nano/llava-next") and item["seconds"] >= 0
        assert item["outcome"] != "accepted" or (item["text"] == attempts[-1]["text"] and not attempts[-1]["failed"])
        assert item["outcome"] == "accepted" or len(attempts) == 5
        assert all(a["tokens"] > 0 for a in attempts)
    assert any(item["reasons"] for item in items)
    assert [name for name, _ in read_metadata(folder)] == list(simple)


class Scripted(fake_captioner.FakeEngine):
    """Answers attempt by attempt what it is told to; "{}" is the simple caption, a dash at the end a cut."""

    def __init__(self, *texts: str):
        super().__init__()
        self.texts = texts

    def answer(self, request, attempt: int) -> Answer:
        caption = request.prompt.split("right: ")[1].split(". Its class")[0]
        text = self.texts[min(attempt, len(self.texts) - 1)].format(caption)
        return Answer(text.rstrip("-"), 9, not text.endswith("-"))


LONG = "{} in winter. " + " ".join(f"It has {n} spots." for n in range(40))


@pytest.mark.parametrize(
    ("texts", "outcome", "text", "reasons", "code"),
    [
        (["{} in spring."], "accepted", "{} in spring.", [], 0),
        (["{} no end", "no caption.", "{} in autumn."], "accepted", "{} in autumn.", ["unfinished"], 0),
        ([LONG, "{} no end"], "shortened", LONG, ["too_many_words", "too_many_tokens"], 0),
        (["{} no end", f"{LONG} It is cut of-"], "shortened", LONG, ["unfinished", "too_many_words"], 0),
        (["no caption."], "fallen back", "{}", ["begins_with_caption"], 3),
        (["{} no end", f"x {LONG}"], "fallen back", "{}", ["unfinished", "begins_with_caption"], 3),
    ],
)
def test_attempts_then_shortening_then_the_simple_caption(
    vsg, monkeypatch, tmp_path, texts, outcome: str, text: str, reasons: list[str], code: int
) -> None:
    folder = make_set(tmp_path / "train", 1)
    monkeypatch.setattr(VSG, "build_engine", lambda *_: Scripted(*texts))
    assert vsg(folder, real=True)[0] == code
    [item] = entries(folder)
    caption = "A chest X-ray image of normal lungs"
    assert item["outcome"] == outcome and set(reasons) <= set(item["reasons"])
    assert text.format(caption).startswith(item["text"]) and item["text"].startswith(caption)
    assert len(item["text"].split()) <= 100 and read(folder / "metadata.csv")[0]["text"] == item["text"]
    if outcome == "shortened":
        assert item["text"].endswith("spots.") and len(item["text"].split()) > 60


def test_too_many_fallen_back_is_exit_code_3_each_time(vsg, tmp_path) -> None:
    folder = make_set(tmp_path / "train")
    code, said = vsg(folder, "--attempts=1", "--max-fallback=0.1")
    assert code == 3 and "had to keep their simple caption, more than --max-fallback 0.1" in said
    assert vsg(folder, "--attempts=1", "--max-fallback=0.1")[0] == 3
    assert vsg(folder, "--attempts=1", "--max-fallback=1")[0] == 0


def test_a_forced_prefix_reaches_the_engine_and_the_journal(vsg, monkeypatch, tmp_path) -> None:
    folder, seen = make_set(tmp_path / "train", 2), []
    prepare = fake_captioner.FakeEngine.prepare
    monkeypatch.setattr(fake_captioner.FakeEngine, "prepare", lambda self, r: (seen.extend(r), prepare(self, r))[1])
    assert vsg(folder, "--force-prefix", "--features=haze; ribs")[0] == 0
    assert [request.prefix for request in seen] == [f"A chest X-ray image of {label}" for label in LABELS[:2]]
    assert all("haze, ribs" in request.prompt for request in seen)
    assert '"force_prefix": true' in (folder / "captions.jsonl").read_text()


def test_a_parent_of_splits_is_described_split_by_split(vsg, tmp_path) -> None:
    for split in ("val", "train"):
        make_set(tmp_path / "set" / split, 6)
    code, said = vsg(tmp_path / "set")
    assert code == 0 and "12 images: " in said and said.index("train/metadata.csv") < said.index("val/metadata.csv")
    alone = make_set(tmp_path / "train", 6)
    vsg(alone)
    assert all((tmp_path / "set" / s / "metadata.csv").read_bytes() == (alone / "metadata.csv").read_bytes()
               for s in ("train", "val"))  # fmt: skip


# --- Nothing is lost, nothing is done twice ---


def test_one_and_two_processes_agree(tmp_path) -> None:
    made = []
    for processes in (1, 2):
        folder = make_set(tmp_path / str(processes) / "train", 22)
        before = [(partial(fake_captioner.install, seconds=0.01),)]
        assert script_exit_codes("VSG", flags(folder), tmp_path / "log", processes, before) == [0] * processes
        items = [{name: item[name] for name in item if name != "seconds"} for item in entries(folder)]
        made.append(((folder / "metadata.csv").read_bytes(), items, sorted(path.name for path in folder.glob(".*"))))
    assert made[0] == made[1] and made[0][2] == [".lock"]


def taken_up(calls: Path) -> Counter:
    return Counter(line.split()[0] for line in calls.read_text().splitlines() if line.endswith(" 0"))


@pytest.mark.parametrize(
    ("kills", "processes"),
    [(3, 1), pytest.param(20, 1, marks=pytest.mark.slow), pytest.param(20, 2, marks=pytest.mark.slow)],
)
def test_kills_lose_at_most_the_chunk_in_flight(kills: int, processes: int, tmp_path, capsys) -> None:
    draws, landed, repeated, seconds = random.Random(0), 0, [], 0.0
    for whole in (tmp_path / "first" / "train", tmp_path / "whole" / "train"):  # the first one waits for imports
        make_set(whole, 30)
        begun = time.monotonic()
        before = [(partial(fake_captioner.install, seconds=0.03),)]
        assert script_exit_codes("VSG", flags(whole), tmp_path / "log", processes, before) == [0] * processes
        seconds = time.monotonic() - begun
    expected = (whole / "metadata.csv").read_bytes()
    for number in range(kills):
        folder, calls = tmp_path / str(number) / "train", tmp_path / f"calls-{number}"
        calls.touch()
        make_set(folder, 30)
        as_prepared(folder)
        at_first = (folder / "metadata.csv").read_bytes()
        before = [(partial(fake_captioner.install, seconds=0.03, calls=calls),)]
        killed = 0
        while landed < kills and killed < 7:
            started = start_script("VSG", flags(folder), tmp_path / "log", processes, before)
            time.sleep(draws.uniform(0, seconds))
            for process in started:
                process.kill()
            codes = exit_codes(started)
            if codes == [0] * processes:
                break
            killed, landed = killed + 1, landed + 1
            assert (folder / "metadata.csv").read_bytes() in (at_first, expected)
        assert script_exit_codes("VSG", flags(folder), tmp_path / "log", processes, before) == [0] * processes
        assert (folder / "metadata.csv").read_bytes() == expected
        assert not list(folder.glob(".captions*")) and len(entries(folder)) == 30
        again = {int(name[:2]) // 4 for name, times in taken_up(calls).items() for _ in range(times - 1)}
        repeated.append(sum(taken_up(calls).values()) - 30)
        assert repeated[-1] <= 4 * killed * processes and len(again) <= killed * processes
        if landed >= kills:
            break
    with capsys.disabled():
        print("\n" + json.dumps({"campaign": "VSG kills", "processes": processes, "kills": landed,
                                 "images_done_twice": sum(repeated)}))  # fmt: skip
    assert landed == kills


def test_a_journal_cut_anywhere_goes_on(vsg, tmp_path) -> None:
    folder, calls = make_set(tmp_path / "train"), tmp_path / "calls"
    assert vsg(folder)[0] == 0
    expected, content = (folder / "metadata.csv").read_bytes(), (folder / "captions.jsonl").read_bytes()
    ends = [place + 1 for place, byte in enumerate(content) if byte == 10]
    for cut in [0, 10, *ends[:6], ends[4] - 1, ends[4] + 40, ends[8], ends[8] + 1, ends[-2], ends[-1] - 1, ends[-1]]:
        (folder / "captions.jsonl").write_bytes(content[:cut])
        (folder / "metadata.csv").unlink()
        calls.write_text("")
        assert vsg(folder, calls=calls)[0] == 0
        assert (folder / "metadata.csv").read_bytes() == expected
        chunks = (sum(end <= cut for end in ends) - 1) // 4 if cut >= ends[0] else 0
        assert sum(taken_up(calls).values()) == 12 - 4 * min(chunks, 3)


def nearly_full_disk() -> None:
    fake_captioner.install()
    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, 6_000))


def test_a_full_disk_is_one_line_and_loses_nothing(vsg, tmp_path) -> None:
    folder, whole = make_set(tmp_path / "train"), make_set(tmp_path / "whole" / "train")
    assert script_exit_codes("VSG", flags(folder), tmp_path / "log", 1, [(nearly_full_disk,)]) == [2]
    said = (tmp_path / "log.0").read_text()
    assert "what captions.jsonl holds is safe: make room" in said and "Traceback" not in said
    assert 4 <= len(entries_before_a_cut(folder)) < 12 and not (folder / "metadata.csv").exists()
    assert vsg(folder)[0] == vsg(whole)[0] == 0
    assert (folder / "metadata.csv").read_bytes() == (whole / "metadata.csv").read_bytes()


def entries_before_a_cut(folder: Path) -> list[str]:
    return [line for line in (folder / "captions.jsonl").read_text().split("\n")[:-1] if '"file_name"' in line]


def test_a_second_run_says_that_all_is_done(vsg, tmp_path) -> None:
    folder, calls = make_set(tmp_path / "train"), tmp_path / "calls"
    vsg(folder)
    before = (folder / "metadata.csv").read_bytes(), (folder / "captions.jsonl").read_bytes()
    code, said = vsg(folder, calls=calls)
    assert code == 0 and "is described already" in said and not calls.exists()
    assert ((folder / "metadata.csv").read_bytes(), (folder / "captions.jsonl").read_bytes()) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_after_the_chunk(vsg, monkeypatch, tmp_path, number, code: int) -> None:
    folder, whole = make_set(tmp_path / "train"), make_set(tmp_path / "whole" / "train")
    vsg(whole)
    sample, sent = fake_captioner.FakeChunk.sample, []

    def signalled(self, picks):
        if not sent:
            sent.append(number)
            signal.raise_signal(number)
        return sample(self, picks)

    monkeypatch.setattr(fake_captioner.FakeChunk, "sample", signalled)
    ended, said = vsg(folder)
    assert ended == code and "2 of 3 chunks are left: run the same command again" in said
    assert len(entries(folder)) == 4 and not (folder / "metadata.csv").exists()
    assert vsg(folder)[0] == 0
    assert (folder / "metadata.csv").read_bytes() == (whole / "metadata.csv").read_bytes()


def test_what_a_person_has_written_stays_unless_overwrite(vsg, tmp_path) -> None:
    folder = make_set(tmp_path / "train")
    as_prepared(folder)
    rows = read(folder / "metadata.csv")
    rows[3]["text"] = rows[5]["text"] = HOSTILE
    write_table(folder / "metadata.csv", rows)
    code, said = vsg(folder)
    assert code == 0 and "2 captions of a person in it are kept (see --overwrite)" in said
    texts = [row["text"] for row in read(folder / "metadata.csv")]
    assert texts[3] == texts[5] == HOSTILE and all(", " in text for text in texts)

    rows = read(folder / "metadata.csv")  # described, and then edited once more
    rows[0]["text"] = "mine"
    write_table(folder / "metadata.csv", rows)
    edited = (folder / "metadata.csv").read_bytes()
    assert "is described already" in vsg(folder)[1] and (folder / "metadata.csv").read_bytes() == edited
    fresh = make_set(tmp_path / "fresh" / "train")
    vsg(fresh)
    assert vsg(folder, "--overwrite")[0] == 0
    assert (folder / "metadata.csv").read_bytes() == (fresh / "metadata.csv").read_bytes()


def test_a_set_that_a_person_has_described_is_left_alone(vsg, tmp_path) -> None:
    folder = make_set(tmp_path / "train", 2)
    write_table(folder / "metadata.csv", [row | {"text": "mine"} for row in read(folder / "raw.csv")])
    code, said = vsg(folder, real=True)
    assert code == 2 and "longer captions for all images already" in said and not (folder / "captions.jsonl").exists()
    assert vsg(folder, "--overwrite")[0] == 0 and read(folder / "metadata.csv")[0]["text"] != "mine"


def test_other_options_are_refused_by_name_or_start_anew(vsg, tmp_path) -> None:
    folder = make_set(tmp_path / "train")
    vsg(folder)
    journal_before = (folder / "captions.jsonl").read_bytes()
    for change, named in (
        ("--seed=1", "seed 0 -> 1"),
        ("--batch-size=2", "batch_size 4 -> 2"),
        ("--domain=dermoscopy", "domain None"),
    ):
        code, said = vsg(folder, change)
        assert code == 2 and named in said and "--overwrite" in said and "Traceback" not in said
    rows = read(folder / "raw.csv")
    write_table(folder / "raw.csv", rows[1:])
    code, said = vsg(folder)
    assert code == 2 and "raw.csv '" in said
    assert (folder / "captions.jsonl").read_bytes() == journal_before
    assert vsg(folder, "--seed=1", "--overwrite")[0] == 0 and {item["seed"] for item in entries(folder)} == {1}
    assert len(read(folder / "metadata.csv")) == 11


def test_a_journal_without_an_item_binds_nobody(vsg, tmp_path) -> None:
    folder, whole = make_set(tmp_path / "train"), make_set(tmp_path / "whole" / "train")
    assert vsg(whole, "--seed=1")[0] == vsg(folder)[0] == 0
    (folder / "captions.jsonl").write_bytes((folder / "captions.jsonl").read_bytes().split(b"\n")[0] + b"\n")
    (folder / "metadata.csv").unlink()
    assert vsg(folder, "--seed=1")[0] == 0
    assert (folder / "metadata.csv").read_bytes() == (whole / "metadata.csv").read_bytes()


def test_a_picture_that_cannot_be_written_is_one_line(vsg, tmp_path) -> None:
    folder = make_set(tmp_path / "train", 2)
    (tmp_path / "file").touch()
    code, said = vsg(folder, f"--picture={tmp_path / 'file' / 'x.png'}")
    assert code == 2 and "all is described, but" in said and "Traceback" not in said
    assert (folder / "metadata.csv").is_file() and "is described already" in vsg(folder)[1]


def test_a_killed_overwriting_run_goes_on(vsg, tmp_path) -> None:
    folder, calls = make_set(tmp_path / "train"), tmp_path / "calls"
    vsg(folder)
    vsg(folder, "--seed=1", "--overwrite")
    expected, lines = (folder / "metadata.csv").read_bytes(), (folder / "captions.jsonl").read_bytes().split(b"\n")
    vsg(folder, "--overwrite")
    for again in (["--overwrite"], []):  # the options of the journal count, whether it is said again or not
        (folder / "captions.jsonl").write_bytes(b"\n".join([*lines[:5], b""]))
        calls.write_text("")
        assert vsg(folder, "--seed=1", *again, calls=calls)[0] == 0
        assert (folder / "metadata.csv").read_bytes() == expected and sum(taken_up(calls).values()) == 8
    calls.write_text("")
    assert vsg(folder, "--seed=1", "--overwrite", calls=calls)[0] == 0 and sum(taken_up(calls).values()) == 12


def test_fewer_images_first_and_the_others_later(vsg, tmp_path) -> None:
    folder, whole, calls = (
        make_set(tmp_path / "train", 22),
        make_set(tmp_path / "whole" / "train", 22),
        tmp_path / "calls",
    )
    vsg(whole)
    expected = {row["file_name"]: row["text"] for row in read(whole / "metadata.csv")}
    assert vsg(folder, "--max-images=7")[0] == 0
    some = {item["file_name"] for item in entries(folder)}
    assert len(some) == 8 and {int(name[:2]) // 4 for name in some} == {0, 3}
    for row in read(folder / "metadata.csv"):
        assert row["text"] == (expected[row["file_name"]] if row["file_name"] in some else row["simple_text"])
    rows = read(folder / "metadata.csv")
    rows[-1]["text"] = "mine"  # of 00.png
    rows[-2]["text"] = rows[-2]["simple_text"]  # the description of 01.png was no good
    rows[-5]["text"] = "mine, too"  # of 04.png, which is not described yet
    write_table(folder / "metadata.csv", rows)
    assert vsg(folder, calls=calls)[0] == 0 and sum(taken_up(calls).values()) == 14
    expected |= {"00.png": "mine", "01.png": rows[-2]["simple_text"], "04.png": "mine, too"}
    assert {row["file_name"]: row["text"] for row in read(folder / "metadata.csv")} == expected
    assert "is described already" in vsg(folder, "--max-images=7")[1]


def test_hostile_text_survives(vsg, monkeypatch, tmp_path) -> None:
    folder = make_set(tmp_path / "train", 6)
    monkeypatch.setattr(VSG, "build_engine", lambda *_: Scripted("{}, " + HOSTILE.rstrip() + " \ud800."))
    assert vsg(folder, real=True)[0] == 0
    texts = [text for _, text in read_metadata(folder)]
    assert all(text.endswith(HOSTILE + " ?.") for text in texts)
    table = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "hub"))
    assert sorted(table["text"]) == sorted(texts)  # with the journal and raw.csv beside the images
    assert vsg(folder, "--overwrite", real=True)[0] == 0


# --- Images and tables that are not as they should be ---


def png(width: int, height: int) -> bytes:
    """A PNG file that claims to be of that size, with no pixels in it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_bad_images_are_named_counted_and_left_out(vsg, tmp_path) -> None:
    folder = make_set(tmp_path / "train")
    bad = {
        "02.png": b"",
        "05.png": (folder / "05.png").read_bytes()[:50],
        "06.png": b"no image",
        "07.png": png(100_000, 100_000),
        "11.png": png(13_000, 13_000),
    }
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    code, said = vsg(folder)
    assert code == 0 and "5 unreadable and left out" in said
    assert all(f"left out: {folder / name}" in said for name in bad) and "13000 x 13000 pixels" in said
    assert {name for name, _ in read_metadata(folder)} == {f"{n:02d}.png" for n in range(12)} - set(bad)
    items = {item["file_name"]: item for item in entries(folder)}
    assert all(items[name]["outcome"] == "unreadable" and items[name]["text"] is None for name in bad)
    assert all("cannot be read" in items[name]["reasons"][0] for name in ("02.png", "05.png", "06.png"))
    assert "is described already" in vsg(folder)[1]


def test_a_set_without_a_readable_image_is_an_error(vsg, tmp_path) -> None:
    folder = make_set(tmp_path / "train", 2)
    for path in folder.glob("*.png"):
        path.write_bytes(b"")
    code, said = vsg(folder)
    assert code == 2 and "no image of" in said and not (folder / "metadata.csv").exists()


def test_unusual_images_reach_the_engine_upright_and_in_rgb(vsg, monkeypatch, tmp_path) -> None:
    folder, seen = make_set(tmp_path / "train", 5), {}
    Image.fromarray(np.full((8, 12), 40_000, np.uint16)).save(folder / "00.png")
    Image.new("CMYK", (12, 8), (0, 0, 0, 128)).save(folder / "01.png", "JPEG")
    Image.new("P", (12, 8), 3).save(folder / "02.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (12, 8)).save(folder / "03.png", "JPEG", exif=exif)
    Image.new("RGBA", (12, 8), (255, 0, 0, 128)).save(folder / "04.png")
    prepare = fake_captioner.FakeEngine.prepare
    monkeypatch.setattr(
        fake_captioner.FakeEngine, "prepare",
        lambda self, r: (seen.update({x.name: x.image for x in r}), prepare(self, r))[1],
    )  # fmt: skip
    assert vsg(folder)[0] == 0
    assert {image.mode for image in seen.values()} == {"RGB"} and len(seen) == 5
    assert seen["03.png"].size == (8, 12) and seen["00.png"].getpixel((0, 0)) == (156, 156, 156)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("name,text\n00.png,A chest X-ray image\n", "no column 'file_name'"),
        ("file_name,caption\n00.png,A chest X-ray image\n", "no column 'text'"),
        ("file_name,text\n", "has no rows"),
        ("file_name,text\n00.png,A chest X-ray image\n00.png,A chest X-ray image\n", "line 3: '00.png' was already"),
        ("file_name,text\n00.png,A chest X-ray image\n./00.png,A chest X-ray image\n", "was already in line 2"),
        ("file_name,text\n../00.png,A chest X-ray image\n", "leads out of"),
        ("file_name,text\n/etc/passwd,A chest X-ray image\n", "leads out of"),
        ("file_name,text\n77.png,A chest X-ray image\n", "does not exist"),
        ("file_name,text\n00.png,\n", "the caption of '00.png' is empty"),
        ("file_name,text,label\n00.png,A chest X-ray image, \n", "line 2: the label of '00.png' is empty"),
        ("file_name,text\n00.png,A picture of something\n", "see --domain, --features and --prompt-file"),
    ],
)
def test_a_bad_table_is_met_before_the_model_loads(vsg, tmp_path, content: str, words: str) -> None:
    folder = make_set(tmp_path / "train", 2)
    (folder / "raw.csv").write_text(content)
    code, said = vsg(folder, real=True)  # loading would take seconds, and say so
    assert code == 2 and words in said and said.count("\n") == 1 and "Traceback" not in said
    assert not (folder / "captions.jsonl").exists() and not (folder / "metadata.csv").exists()


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--attempts=0", "--attempts is 0"),
        ("--max-fallback=2", "--max-fallback is 2"),
        ("--engine=openai", "--base-url"),
        ("--picture=captions.txt", "--picture is captions.txt"),
        ("--prompt-file=nowhere.txt", "--prompt-file nowhere.txt cannot be read"),
        ("--tokenizer=nowhere/at/all", "cannot load the tokenizer of nowhere/at/all"),
    ],
)
def test_bad_options_are_one_line(vsg, tmp_path, flag: str, words: str) -> None:
    code, said = vsg(make_set(tmp_path / "train", 2), flag, real=True)
    assert code == 2 and words in said and said.count("\n") == 1


def test_random_weights_describe_no_set_that_was_not_named() -> None:
    with pytest.raises(errors.UserError, match="give a copy of a set as --data-dir"):
        VSGOptions(random_weights="llama3-llava-next-8b").check()
    VSGOptions(random_weights="llama3-llava-next-8b", data_dir="copy").check()


def test_a_folder_without_captions_or_with_another_table_is_refused(vsg, tmp_path) -> None:
    assert "has no raw.csv" in vsg(tmp_path)[1]
    assert f"the folder {tmp_path / 'gone'} does not exist; check --data-dir" in vsg(tmp_path / "gone")[1]
    folder = make_set(tmp_path / "train", 2)
    (folder / "metadata.jsonl").write_text("{}\n")
    assert "move it away" in vsg(folder)[1]
    (folder / "metadata.jsonl").unlink()
    (folder / "captions.jsonl").write_text('{"mine": 1}\n')
    code, said = vsg(folder)
    assert code == 2 and "no journal of this program" in said
    (folder / "captions.jsonl").unlink()
    for table in ("file_name;text\n00.png;mine\n", "file_name,caption\n00.png,mine\n", ""):
        (folder / "metadata.csv").write_text(table)
        code, said = vsg(folder)
        assert code == 2 and "lacks the columns file_name,text" in said and said.count("\n") == 1
        assert (folder / "metadata.csv").read_text() == table and not (folder / "captions.jsonl").exists()


def test_one_vsg_at_a_time_in_a_folder(tmp_path) -> None:
    folder = make_set(tmp_path / "train")
    [first] = start_script(
        "VSG", flags(folder), tmp_path / "first", 1, [(partial(fake_captioner.install, seconds=2),)]
    )
    while not (folder / "captions.jsonl").exists():
        time.sleep(0.01)
    assert script_exit_codes("VSG", flags(folder), tmp_path / "second", 1, [(fake_captioner.install,)]) == [2]
    assert "another process describes images in" in (tmp_path / "second.0").read_text()
    first.kill()
    first.join()


# --- Which set, which model ---


@pytest.mark.skipif(not (VSG.ROOT / captioners.NANO).is_dir(), reason="the bundled captioner is not there")
def test_the_bundled_captioner_describes_x_rays(vsg, x_rays, tmp_path) -> None:
    folder = tmp_path / "train"
    shutil.copytree(x_rays, folder)
    (folder / "metadata.csv").rename(folder / "raw.csv")
    code, said = vsg(folder, "--max-fallback=0.2", real=True)
    assert code == 0, said
    assert sum(item["outcome"] == "accepted" for item in entries(folder)) >= 10
    assert len({item["text"] for item in entries(folder)}) >= 9  # it looks at the images


def test_a_server_is_asked(vsg, tmp_path) -> None:
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(request)
            prompt = next(part["text"] for part in request["messages"][-1]["content"] if part["type"] == "text")
            caption = prompt.split("right: ")[1].split(". Its class")[0]
            choice = {"message": {"role": "assistant", "content": f"{caption}, seen."}, "finish_reason": "stop"}
            body = json.dumps({"choices": [choice], "usage": {"completion_tokens": 5}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/v1"
        folder = make_set(tmp_path / "train", 6)
        wanted = ["--engine=openai", f"--base-url={address}", "--model=some/model", "--top-k=0", "--max-new-tokens=77"]
        code, said = vsg(folder, *wanted, real=True)
        server.shutdown()
    assert code == 0 and "6 accepted" in said and len(asked) == 6
    assert {(request["model"], request["max_tokens"], request.get("top_k")) for request in asked} == {
        ("some/model", 77, None)
    }
    assert (
        all(text.endswith(", seen.") for _, text in read_metadata(folder))
        and entries(folder)[0]["model"] == "some/model"
    )
    assert "127.0.0.1" not in (folder / "captions.jsonl").read_text()  # another address may go on with the work
    code, said = vsg(make_set(tmp_path / "down", 2), *wanted, "--retries=0", real=True)
    assert code == 2 and "Traceback" not in said and [line for line in said.splitlines() if line.startswith("error: ")]


def test_a_real_model_of_random_weights_is_run_and_rejected(vsg, tmp_path) -> None:
    """The smallest LLaVA-NeXT: it says nothing sensible, so that all images keep their simple captions."""
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    processor = byte_processor(vision, [[28, 56], [56, 28]])
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    config = LlavaNextConfig(
        text_config=text, vision_config=vision, image_grid_pinpoints=[[28, 56], [56, 28]],
        image_token_index=processor.image_token_id,
    )  # fmt: skip
    for part in (random_model(config), processor):
        part.save_pretrained(tmp_path / "model")
    made = []
    for name in ("one", "two"):
        folder = make_set(tmp_path / name / "train", 6)
        code, said = vsg(folder, f"--model={tmp_path / 'model'}", "--max-new-tokens=8", "--attempts=2", real=True)
        assert code == 3 and "6 fallen back" in said
        made.append([{name: item[name] for name in item if name != "seconds"} for item in entries(folder)])
    assert made[0] == made[1] and all(len(item["attempts"]) == 2 for item in made[0])
    assert vsg(make_set(tmp_path / "train", 2), f"--model={tmp_path}", real=True)[0] == 2  # no model in there


@pytest.fixture
def card(tmp_path, monkeypatch) -> Path:
    """A bundled captioner that knows chest X-rays only."""
    folder = tmp_path / "captioner"
    folder.mkdir()
    (folder / "card.json").write_text('{"domains": ["chest-xray"]}')
    monkeypatch.setattr(captioners, "NANO", str(folder))
    return folder


def test_the_bundled_captioner_says_nothing_of_what_it_does_not_know(vsg, card, monkeypatch, tmp_path) -> None:
    endoscopy = make_set(tmp_path / "kvasir" / "train", 3, text="An endoscopic image of polyps", label="polyps")
    code, said = vsg(endoscopy)
    assert code == 2 and said.count("\n") == 1
    assert f"python VSG.py --data-dir {endoscopy} --model {captioners.FULL_SIZE}" in said
    assert vsg(endoscopy, "--domain=chest-xray")[0] == 2  # whatever a person says of it
    untold = make_set(tmp_path / "my x-rays" / "train", 3, text="A picture of polyps", label="polyps")
    assert vsg(untold)[0] == 2 and vsg(untold, "--domain=chest-xray")[0] == 0
    code, said = vsg(untold, "--domain=endoscopy", "--overwrite")
    assert code == 2 and f"--data-dir '{untold}' --model" in said
    assert vsg(make_set(tmp_path / "train", 3))[0] == 0

    other = make_set(tmp_path / "isic" / "train", 3, text="A dermoscopic image of nevus", label="nevus")
    monkeypatch.setattr(captioners, "_gpu_bytes", lambda: 24e9)  # holds the weights, but no chunk beside them
    assert vsg(other)[0] == 2
    monkeypatch.setattr(captioners, "_gpu_bytes", lambda: 40e9)
    code, said = vsg(other)
    assert code == 0 and f"not dermoscopy of 'A dermoscopic image of nevus': using {captioners.FULL_SIZE}" in said
    assert vsg(other, f"--model={card}", "--overwrite")[0] == 2  # asked for by name, it is never replaced


def test_the_papers_name_of_the_model_is_understood(tmp_path) -> None:
    assert captioners.choose(captioners.PUBLISHED, {"endoscopy": "x"}, "d") == captioners.FULL_SIZE


def test_kvasir_is_the_default_where_it_is_prepared(vsg, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)  # away from the real sets, which no test may touch
    for module in (VSG, training_data):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(captioners, "TOKENIZER", str(Path(__file__).parents[1] / "nano" / "pixart"))
    monkeypatch.setattr(
        sys.modules[__name__], "flags", lambda folder, *more: [f"--picture={tmp_path / 'c.png'}", *more]
    )
    for name in ("chest-xray", "kvasir"):
        folder = make_set(tmp_path / "dataset" / name / "train", 2)
        as_prepared(folder)
        assert f"dataset/{name}/train/metadata.csv is written" in vsg(folder)[1]


# --- Parts ---


def test_long_captions_stay_in_their_place() -> None:
    image = Image.new("RGB", (64, 64))
    grids = [image_grid([[image], [image]], row_names=[name, "short"], cell=64) for name in ("x", "long words " * 40)]
    usual, long = (np.asarray(grid)[72:, :120] for grid in grids)
    assert np.array_equal(usual, long)
    few, many = (caption_sheet([image] * 4, ["short"] * 3 + [caption]) for caption in ("word", "a long word " * 80))
    assert many.height > few.height and many.width == few.width
    assert np.asarray(many)[-10:].min() == 255  # a margin below the last line


def test_work_in_advance_keeps_the_order_and_its_distance() -> None:
    begun = []
    jobs = list(range(7))
    for place, (job, done) in enumerate(captioning.in_advance(lambda job: (begun.append(job), job * 2)[1], jobs)):
        assert (job, done) == (place, place * 2) and len(begun) <= place + captioning.AHEAD + 1
    assert begun == jobs
    assert list(captioning.in_advance(str, [1])) == [(1, "1")] and list(captioning.in_advance(str, [])) == []


def test_parts_of_other_processes_are_taken_in_once(tmp_path) -> None:
    names = [["a"], ["b"], ["c"]]
    made = journal.begin(tmp_path / "captions.jsonl", names, {"seed": 0}, range(3))
    made.append([{"file_name": "b", "chunk": 1}], rank=1)
    made.append([{"file_name": "a", "chunk": 0}])
    with open(made.part(1), "a") as file:
        file.write('{"file_name": "c", "chu')
    stale = journal.Journal(made.path, names, {"options": {"seed": 9}})
    stale.append([{"file_name": "c", "chunk": 2}], rank=2)
    again = journal.begin(tmp_path / "captions.jsonl", names, {"seed": 0}, range(3))
    assert sorted(again.items) == [0, 1] and not again.parts()
    assert sorted(journal.Journal.read(made.path, names).items) == [0, 1]
