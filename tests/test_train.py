"""train.py from end to end on a tiny DiT: processes, exact resumption, checkpoints, errors, and what it leaves."""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_dit
import torch
from forked_runs import ROOT, disturb, script_exit_codes

import models
import train
from medart_core import checkpoint, dit_checkpoint, feature_store, labelled_images, numbered_runs, options, stopping
from medart_core.checkpoint import FINISHED
from medart_core.dit_options import ALIASES, DiTOptions
from medart_core.errors import UserError
from train_options import PRESETS

RUN = "DiT-T-2"
TIMING = ("steps_per_sec", "images_per_sec", "peak_mem_gb", "mfu_of_measured", "mfu_of_data_sheet")


@pytest.fixture(scope="session")
def features(x_rays, tmp_path_factory) -> Path:
    """A whole store of the twelve X-rays with random moments, of 32 px images."""
    folder = tmp_path_factory.mktemp("features")
    images, shape = labelled_images.find(x_rays), (12, 2, 2, 4, 4, 4)
    feature_store.begin(folder, images, {"vae": "none", "image_size": 32, "scaling_factor": 0.5}, shape)
    extraction = feature_store.Extraction(folder)
    for group in extraction.pending():
        draws = torch.Generator().manual_seed(group)
        extraction.write(group, torch.rand(feature_store.GROUP, *shape[1:], generator=draws))
    extraction.flush()
    extraction.publish()
    return folder


@pytest.fixture
def flags(features, tmp_path):
    """The smallest run: four images a step, three steps an epoch."""
    return [f"--model={tiny_dit.NAME}", f"--features-path={features}", "--global-batch-size=4", "--max-steps=6",
            "--learning-rate=1e-2", "--log-every=1", "--ckpt-every=3", "--num-samples=0", "--report-to=none",
            f"--results-dir={tmp_path / 'results'}"]  # fmt: skip


@pytest.fixture
def run(monkeypatch):
    """Run train.py in this process; returns its exit code."""
    from accelerate.state import PartialState

    tiny_dit.make_known()

    def call(*arguments: str, preset: str | None = None) -> int:
        PartialState._reset_state()
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        return train.main(preset)

    yield call
    del models.DiT_models[tiny_dit.NAME]


def entries(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMING} for line in lines]


def read(folder: Path, step: int) -> dict:
    file = folder / "checkpoints" / f"{step:07d}.pt"
    return torch.load(file, weights_only=True)


def same(one: object, other: object) -> bool:
    """Whether two trees of tensors are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)  # pyright: ignore[reportArgumentType]
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)  # pyright: ignore
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))  # pyright: ignore[reportArgumentType]
    return one == other


def forked(arguments: list[str], log: Path, processes: int = 1, *prepare: tuple) -> list[int]:
    """Exit codes of train.py in processes of its own, in all of which `prepare` is called first."""
    return script_exit_codes("train", arguments, log, processes, [(tiny_dit.make_known,), *prepare])


# --- What a run leaves ---


def test_a_run_leaves_checkpoints_log_and_options_in_a_numbered_folder(run, flags, features, tmp_path):
    assert run(*flags, f"--val-path={features}") == 0
    folder = tmp_path / "results" / f"000-{RUN}"
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == [f"{step:07d}{end}" for step in (3, 6) for end in ("-manifest.json", "-resume.json", ".pt")]
    state = read(folder, 6)
    assert sorted(state) == ["args", "ema", "model", "opt"]
    assert type(state["args"]) is dict and state["args"]["class_names"][0] == "bacterial pneumonia"
    assert not same(state["model"], state["ema"]) and state["model"].keys() == state["ema"].keys()
    text = (folder / "log.txt").read_text()
    assert re.search(r"\(step=0000003\) Train Loss: \d\.\d{4}, Train Steps/Sec: \d+\.\d\d$", text, re.MULTILINE)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 6]
    assert {"loss", "grad_norm", "lr", *TIMING} <= lines[0].keys() and lines[0]["mfu_of_data_sheet"] is None
    assert lines[-1]["loss_validation"] > 0
    weights = dit_checkpoint.read(folder / "checkpoints" / "0000006.pt")
    model = dit_checkpoint.load(models.DiT_models, weights, name=tiny_dit.NAME, image_size=32, num_classes=3)
    assert same(model.state_dict(), state["ema"])
    run(*flags)  # finished: the same again is a new run
    assert (tmp_path / "results" / f"001-{RUN}" / FINISHED).exists()
    assert same(read(tmp_path / "results" / f"001-{RUN}", 6)["model"], state["model"])


def test_sample_grids_are_drawn_from_the_average(run, flags, tmp_path, tiny_pixart, x_rays):
    online = [f for f in flags if not f.startswith(("--features", "--num-samples"))]
    online += [f"--data-path={x_rays}", f"--vae={tiny_pixart}", "--image-size=32", "--num-workers=0"]
    online += ["--num-classes=4"]  # one more than the data have: it has no name, but is drawn
    assert run(*online, "--max-steps=2", "--sample-every=1", "--num-samples=1", "--num-sampling-steps=2") == 0
    folder = tmp_path / "results" / f"000-{RUN}"
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["step-000001.png", "step-000002.png"]


def test_images_encoded_in_every_step_train_like_their_features(
    run, flags, tmp_path, tiny_pixart, x_rays, monkeypatch
):
    import extract_features

    shared = [f for f in flags if not f.startswith("--features")] + ["--max-steps=2"]
    where = [f"--data-path={x_rays}", f"--vae={tiny_pixart}", "--image-size=32", "--num-workers=0"]
    monkeypatch.chdir(tiny_pixart.parent)
    where[1] = f"--vae={tiny_pixart.name}"  # kept as what it is in any working directory
    assert run(*shared, *where) == 0
    monkeypatch.setattr(sys, "argv", ["extract_features.py", *where, f"--features-path={tmp_path / 'features'}"])
    extract_features.main()
    assert run(*shared, f"--feature-path={tmp_path / 'features'}", where[1]) == 0
    vaes = [read(tmp_path / "results" / f"00{n}-{RUN}", 2)["args"]["vae"] for n in (0, 1)]
    assert vaes == [str(tiny_pixart.resolve())] * 2
    online, stored = ([e["loss"] for e in entries(tmp_path / "results" / f"00{n}-{RUN}")] for n in (0, 1))
    assert online == pytest.approx(stored, rel=1e-3)


def test_held_out_images_of_other_classes_are_not_measured_by_the_wrong_names(
    run, flags, tmp_path, tiny_pixart, x_rays, capsys
):
    own = [flag for flag in flags if not flag.startswith("--features")] + ["--max-steps=1", "--image-size=32"]
    train_set, val = shutil.copytree(x_rays, tmp_path / "train"), shutil.copytree(x_rays, tmp_path / "val")
    lines = (val / "metadata.csv").read_text().splitlines(keepends=True)
    (val / "metadata.csv").write_text("".join(line for line in lines if "bacterial" not in line))
    own += [f"--data-path={train_set}", f"--vae={tiny_pixart}", "--num-workers=0"]
    assert run(*own) == 0 and f"no validation loss: {val} has other classes" in capsys.readouterr().out
    assert not any("loss_validation" in entry for entry in entries(tmp_path / "results" / f"000-{RUN}"))
    with pytest.raises(UserError, match=r"has other classes than the training data .*as --val-path, or leave it out"):
        run(*own, f"--val-path={val}")


# --- Processes and parts of a step ---


def test_processes_and_parts_change_the_loss_by_rounding_only(run, flags, tmp_path):
    run(*flags)
    for extra in (["--gradient-accumulation-steps=2"], ["--micro-batch-size=3"]):
        run(*flags, *extra)
    arguments = [*flags, "--micro-batch-size=1"]
    assert forked(arguments, tmp_path / "log", 2) == [0, 0]
    logs = [entries(tmp_path / "results" / f"00{number}-{RUN}") for number in range(4)]
    for other in logs[1:]:
        for name in ("loss", "grad_norm"):
            assert [e[name] for e in other] == pytest.approx([e[name] for e in logs[0]], rel=2e-4)
    assert logs[0][0]["loss"] != logs[0][3]["loss"]


def test_gradients_are_averaged_once_per_step(monkeypatch):
    from torch import nn

    from medart_core.dit_run import DiTRun

    class Recorded(nn.parallel.DistributedDataParallel):
        def __init__(self, model: nn.Module):
            nn.Module.__init__(self)
            self.module, self.calls = model, []

        def no_sync(self):
            self.calls.append("no_sync")
            return __import__("contextlib").nullcontext()

    recorded = Recorded(nn.Linear(1, 1))
    run = object.__new__(DiTRun)
    run.network = recorded
    for last in (False, False, True):
        with run.part(last):
            pass
    assert recorded.calls == ["no_sync"] * 2


# --- Resuming ---

WINDOW = 2  # micro-batches of a step
# When and how a run ends, as (disturbance, --ckpt-every, the checkpoint that it is resumed from).
INTERRUPTIONS = {
    "mid-epoch": (("SIGTERM", 4 * WINDOW), 500, 5),
    "epoch end": (("SIGKILL", 3 * WINDOW), 3, 3),
    "inside accumulation": (("SIGKILL", 4 * WINDOW + 1), 2, 4),
}


@pytest.mark.parametrize(("moment", "processes"), [*zip(INTERRUPTIONS, (2, 1, 2), strict=True)])
def test_resuming_is_exact(flags, tmp_path, moment, processes):
    disturbance, interval, saved = INTERRUPTIONS[moment]
    arguments = [*flags, f"--micro-batch-size={2 // processes}", "--log-every=2", f"--ckpt-every={interval}"]
    whole = [*arguments, f"--results-dir={tmp_path / 'whole'}"]
    assert forked(whole, tmp_path / "log", processes) == [0] * processes
    code = 143 if "SIGTERM" in disturbance else -signal.SIGKILL
    ending = (disturb, *disturbance, "train", "diffusion_loss")
    assert forked(arguments, tmp_path / "log", processes, ending) == [code] * processes
    folder = tmp_path / "results" / f"000-{RUN}"
    assert numbered_runs.latest(folder) == saved and not (folder / FINISHED).exists()
    assert forked(arguments, tmp_path / "log", processes) == [0] * processes
    assert f"resuming from {folder / 'checkpoints'}/{saved:07d}.pt" in Path(f"{tmp_path / 'log'}.0").read_text()
    other = tmp_path / "whole" / f"000-{RUN}"
    one, two = read(folder, 6), read(other, 6)
    assert same([one["model"], one["ema"], one["opt"]], [two["model"], two["ema"], two["opt"]])
    assert entries(folder) == entries(other)


@pytest.mark.parametrize("moment", ["midst", "manifest"])
def test_a_kill_while_saving_loses_one_interval(flags, run, tmp_path, moment):
    dying = [(tiny_dit.make_known,), (tiny_dit.die_while_saving, moment, 1)]
    assert script_exit_codes("train", flags, tmp_path / "log", 1, dying) == [-signal.SIGKILL]
    folder = tmp_path / "results" / f"000-{RUN}"
    assert numbered_runs.latest(folder) == 3
    assert run(*flags) == 0 and numbered_runs.steps(folder) == [3, 6]
    assert not list((folder / "checkpoints").glob(".unfinished*"))
    run(*flags, f"--results-dir={tmp_path / 'whole'}")
    assert same(read(folder, 6)["model"], read(tmp_path / "whole" / f"000-{RUN}", 6)["model"])


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(flags, tmp_path):
    full = (disturb, "full disk", 4, "train", "diffusion_loss")
    assert forked(flags, tmp_path / "log", 1, full) == [2]
    said = (tmp_path / "log.0").read_text()
    assert said.count("error: cannot write in") == 1 and "File too large" in said and "Traceback" not in said
    folder = tmp_path / "results" / f"000-{RUN}"
    assert numbered_runs.latest(folder) == 3 and not list((folder / "checkpoints").glob(".unfinished*"))


def test_a_damaged_checkpoint_is_passed_over_and_a_longer_run_goes_on(run, flags, tmp_path, capsys):
    run(*flags)
    folder = tmp_path / "results" / f"000-{RUN}"
    (folder / "checkpoints" / "0000006.pt").write_bytes(b"damaged")
    assert run(*flags, "--max-steps=7", "--keep-ckpts=1") == 0
    said = capsys.readouterr()
    assert "0000006.pt is missing or damaged: this checkpoint is passed over" in said.err
    assert f"resuming from {folder / 'checkpoints'}/0000003.pt" in said.out
    assert numbered_runs.steps(folder) == [7] and entries(folder)[-1]["step"] == 7
    for file in (folder / "checkpoints").glob("*.pt"):
        file.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"no whole checkpoint in .*--fresh"):
        run(*flags, "--max-steps=8")


def test_other_options_or_fresh_start_another_run(run, flags, tmp_path, capsys):
    run(*flags, "--max-steps=1")
    folder = tmp_path / "results" / f"000-{RUN}"
    (folder / FINISHED).unlink()
    run(*flags, "--max-steps=1", "--global-seed=1")
    said = f"a new run: {folder} is unfinished, but of other options (global_seed 0 -> 1)"
    assert capsys.readouterr().out.count(said) == 1
    run(*flags, "--max-steps=1", "--fresh")
    assert len(list((tmp_path / "results").iterdir())) == 3
    for number in (1, 2):
        (tmp_path / "results" / f"00{number}-{RUN}" / FINISHED).unlink()
    capsys.readouterr()
    run(*flags, "--max-steps=1", "--global-seed=1", "--no-flip")  # of several the nearest is named
    said = capsys.readouterr().out
    assert said.count("a new run:") == 1 and f"001-{RUN} is unfinished, but of other options (no_flip False" in said
    run(*flags, "--max-steps=1", "--global-seed=1")  # goes on with its own, whatever else is unfinished
    said = capsys.readouterr().out
    assert "a new run:" not in said and f"run: {tmp_path / 'results' / f'001-{RUN}'}\n" in said


def test_a_run_is_not_continued_on_other_data_of_the_same_number(run, flags, features, tmp_path, capsys):
    store = shutil.copytree(features, tmp_path / "store")
    own = [flag for flag in flags if not flag.startswith("--features")] + [f"--features-path={store}", "--max-steps=1"]
    run(*own)
    folder = tmp_path / "results" / f"000-{RUN}"
    (folder / FINISHED).unlink()
    array = np.load(store / "moments.npy", mmap_mode="r+")
    array[0, 0, 0, 0, 0, 0] += 1
    array.flush()
    (store / "manifest.json").unlink()
    checkpoint.seal(store / "manifest.json", [store / name for name in ("moments.npy", "labels.npy", "features.json")])
    run(*own)
    said = capsys.readouterr().out
    assert re.search(rf"a new run: {folder} is unfinished, but of other options \(data \w{{16}} -> \w{{16}}\)\n", said)


def test_old_features_are_told_apart_by_their_content(tmp_path):
    from medart_core.dit_data import DIGESTED, OldFeatures

    def digest(folder: Path) -> str:
        return OldFeatures(folder, None, 3, "ema").digest()

    folder = old_features(tmp_path / "old", DIGESTED + 44)
    found = {digest(folder)}
    assert digest(old_features(tmp_path / "same", DIGESTED + 44)) in found
    np.save(folder / "imagenet256_labels" / f"{DIGESTED + 43}.npy", np.array([0]))
    found.add(digest(folder))
    np.save(folder / "imagenet256_features" / "0.npy", np.ones((1, 4, 4, 4), np.float32))
    found.add(digest(folder))
    found.add(digest(old_features(tmp_path / "more", DIGESTED + 45)))
    assert len(found) == 4


def test_a_run_that_another_process_works_on_is_left_alone(run, flags, tmp_path, monkeypatch):
    run(*flags, "--max-steps=1")
    (tmp_path / "results" / f"000-{RUN}" / FINISHED).unlink()
    import fcntl

    def locked(*_):
        raise BlockingIOError(11, "locked")

    monkeypatch.setattr(fcntl, "lockf", locked)
    with pytest.raises(UserError, match="another process works in"):
        run(*flags, "--max-steps=1")


# --- Losses and updates ---


@pytest.mark.parametrize("what", ["nan loss", "inf gradient"])
def test_what_is_not_finite_ends_all_processes_before_the_update(flags, tmp_path, what):
    ending = (disturb, what, 4, "train", "diffusion_loss")
    assert forked(flags, tmp_path / "log", 2, ending) == [2, 2]
    said = [Path(f"{tmp_path / 'log'}.{rank}").read_text() for rank in range(2)]
    assert f"error: step 5: the {what.split()[1]} is not finite; nothing was updated" in said[0]
    assert "0000003.pt is intact" in said[0] and "Traceback" not in "".join(said) and "error:" not in said[1]
    assert numbered_runs.latest(tmp_path / "results" / f"000-{RUN}") == 3


def test_label_dropout_warmup_clipping_and_flips_do_what_they_say(run, flags, tmp_path, monkeypatch):
    dropped, real = [], train.diffusion_loss
    monkeypatch.setattr(train, "diffusion_loss", lambda *a: dropped.append(a[-1]) or real(*a))
    run(*flags, "--class-dropout=0.5", "--warmup-steps=4", "--max-grad-norm=1e-3")
    share = torch.cat(dropped).float().mean()
    assert 0.2 < share < 0.8
    rates = [entry["lr"] for entry in entries(tmp_path / "results" / f"000-{RUN}")]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])
    moments = read(tmp_path / "results" / f"000-{RUN}", 3)["opt"]["state"]
    assert max(state["exp_avg"].norm() for state in moments.values()) < 1e-3
    run(*flags, "--no-flip")
    run(*flags)
    plain, flipped = (entries(tmp_path / "results" / f"00{n}-{RUN}")[2]["loss"] for n in (1, 2))
    assert plain != flipped


def test_an_overflow_in_fp16_leaves_out_the_step_and_its_average(flags, features):
    from medart_core.dit_run import DiTRun

    model = models.DiT(4, 2, hidden_size=32, depth=1, num_heads=2, num_classes=3)
    facts: dict[str, Any] = dict(
        learning_rate=1e-2, weight_decay=0.0, warmup_steps=0, max_grad_norm=None, ema_decay=0.5
    )
    run = DiTRun.start(model, torch.device("cpu"), torch.float32, Path(), {}, **facts, no_ema_warmup=True)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [p.clone() for p in (*model.parameters(), *run.ema.model.parameters())]
    loss = model(torch.randn(2, 4, 4, 4), torch.zeros(2), torch.zeros(2, dtype=torch.long)).sum()
    run.scaler.scale(loss * float("inf")).backward()
    run.finish_step(torch.ones(()), False)
    after = [*model.parameters(), *run.ema.model.parameters()]
    assert all(map(torch.equal, before, after)) and run.scaler.get_scale() == 2.0 and run.step == 1


def test_overflows_in_fp16_without_end_are_one_line(tmp_path):
    from medart_core.dit_run import MAX_OVERFLOWS, DiTRun

    model = torch.nn.Linear(1, 1)
    facts: dict[str, Any] = dict(learning_rate=1e-2, weight_decay=0.0, warmup_steps=0, max_grad_norm=1.0)
    facts |= {"ema_decay": 0.5, "no_ema_warmup": True}
    run = DiTRun.start(model, torch.device("cpu"), torch.float32, tmp_path, {}, **facts)
    run.scaler = torch.amp.GradScaler("cpu")

    def step(factor: float) -> None:
        run.scaler.scale(model(torch.ones(1, 1)).sum() * factor).backward()
        run.finish_step(torch.ones(()), False)

    for factor in [float("nan")] * (MAX_OVERFLOWS - 1) + [1.0] + [float("inf")] * (MAX_OVERFLOWS - 1):
        step(factor)  # a good step between them: it may still find its scale
    weight = model.weight.clone()
    with pytest.raises(UserError, match=r"^steps 31 to 60: the gradient is too large for fp16 in each.*bf16 rather"):
        step(float("inf"))
    assert torch.equal(model.weight, weight) and run.step == 2 * MAX_OVERFLOWS - 1


# --- Data of other makers, and errors ---


def old_features(folder: Path, count: int = 12, side: int = 4) -> Path:
    for part in ("imagenet256_features", "imagenet256_labels"):
        (folder / part).mkdir(parents=True)
    for number in range(count):
        np.save(folder / "imagenet256_features" / f"{number}.npy", np.full((1, 4, side, side), number, np.float32))
        np.save(folder / "imagenet256_labels" / f"{number}.npy", np.array([number % 3]))
    return folder


def test_old_features_are_paired_by_name(run, flags, tmp_path):
    from medart_core.dit_data import OldFeatures

    folder = old_features(tmp_path / "old")
    source = OldFeatures(folder, 32, 3, "ema")
    [(values, labels)] = source.read([[(0, 10), (0, 2)]], [])
    assert values[:, 0, 0, 0].tolist() == [10, 2] and labels.tolist() == [1, 2]
    own = [flag for flag in flags if not flag.startswith("--features")]
    assert run(*own, f"--feature-path={folder}", "--num-classes=3") == 0
    with pytest.raises(UserError, match="has class 2, the classes are 0 to 1; correct --num-classes"):
        run(*own, f"--feature-path={folder}", "--num-classes=2")
    np.save(folder / "imagenet256_features" / "11.npy", np.zeros((1, 4, 8, 8), np.float32))
    with pytest.raises(UserError, match=r"imagenet256_features/11.npy is damaged, or of another size \("):
        run(*own, f"--feature-path={folder}", "--num-classes=3")
    larger = old_features(tmp_path / "larger")
    for part in ("features", "labels"):
        (larger / f"imagenet256_{part}").rename(folder / f"imagenet512_{part}")
    two = (
        r"old holds imagenet256_features and imagenet512_features; name one of them: --features-path .*old/imagenet512"
    )
    with pytest.raises(UserError, match=two):
        run(*own, f"--feature-path={folder}", "--num-classes=3")
    assert run(*own, f"--feature-path={folder / 'imagenet512_features'}", "--num-classes=3") == 0
    shutil.rmtree(folder / "imagenet512_features")
    (folder / "imagenet256_labels" / "7.npy").unlink()
    with pytest.raises(UserError, match=r"imagenet256_labels/7.npy is missing \(1 such\)"):
        run(*own, f"--feature-path={folder}", "--num-classes=3")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--image-size=64"], "holds features of 32 px images, not of 64"),
        (["--num-classes=2"], "--num-classes is 2, but the data have 3 classes"),
        (["--vae=mse"], "was made with --vae none, not with mse"),
        (["--model=DiT-M/2"], "there is no model 'DiT-M/2'; choose from DiT-XL/2"),
        (["--features-path=/no/such"], "/no/such does not exist; make features with extract_features.py"),
        (["--data-path=/no/such"], "exclude each other"),
        (["--ema-decay=1"], "less than 1"),
        (["--num-sampling-steps=1"], "give 2 to 1000"),
        (["--global-batch-size=0"], "above 0"),
        (["--micro-batch-size=1", "--gradient-accumulation-steps=2"], "say the same"),
        (["--options=fast"], "--options fast does not exist; choose from original, baseline"),
        (["--ckpt=/no/such.pt"], "/no/such.pt does not exist"),
    ],
)
def test_what_cannot_work_is_named_before_there_is_a_folder(run, flags, tmp_path, extra, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run(*flags, *extra)
    assert not (tmp_path / "results").exists()


def test_weights_to_start_from_are_taken_or_refused_in_one_line(run, flags, tmp_path):
    run(*flags)
    file = tmp_path / "results" / f"000-{RUN}" / "checkpoints" / "0000006.pt"
    start = [f"--ckpt={file}", "--learning-rate=1e-9", "--max-steps=1"]
    assert run(*flags, *start) == 0
    again = read(tmp_path / "results" / f"001-{RUN}", 1)["model"]
    torch.testing.assert_close(again, read(tmp_path / "results" / f"000-{RUN}", 6)["ema"], atol=1e-7, rtol=0)
    with pytest.raises(UserError, match=r"knows 3 classes, not 4; give --num-classes 3"):
        run(*flags, *start, "--num-classes=4")
    with pytest.raises(UserError, match="was trained without --qk-norm"):
        run(*flags, *start, "--qk-norm")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read as weights"):
        run(*flags, *start)


def test_an_old_checkpoint_with_a_namespace_can_be_started_from(run, flags, tmp_path):
    model = models.DiT_models[tiny_dit.NAME](input_size=4, num_classes=3)
    args = argparse.Namespace(num_classes=3, image_size=32)
    torch.save({"model": model.state_dict(), "ema": model.state_dict(), "opt": {}, "args": args}, tmp_path / "old.pt")
    assert run(*flags, "--max-steps=1", f"--ckpt={tmp_path / 'old.pt'}") == 0


# --- Commands and presets ---


def test_the_published_commands_are_understood():
    for command in ("--model DiT-XL/2 --features-path /f", "--model DiT-XL/2 --feature-path /f --image-size 512"):
        opts = options.parse(DiTOptions, None, shlex.split(command), aliases=ALIASES)
        assert (opts.features_path, opts.global_batch_size, opts.epochs) == ("/f", 256, 1400)
        assert (opts.ckpt_every, opts.log_every, opts.global_seed, opts.ema_decay) == (50_000, 100, 0, 0.9999)


def test_the_launchers_precision_counts_where_the_options_leave_it(monkeypatch):
    def asked(launcher: str, *arguments: str) -> str:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
        return train.asked_precision(
            options.parse(DiTOptions, None, arguments, presets=PRESETS, preset_option="options")
        )

    assert [asked(word) for word in ("no", "fp16", "bf16")] == ["no", "fp16", "bf16"]
    assert [asked(word, "--options=amp") for word in ("no", "fp16")] == ["bf16", "fp16"]
    assert asked("fp16", "--options=baseline") == "no" and asked("fp16", "--mixed_precision=no") == "no"


def start_preset(name: str, folder: Path, *launcher: str) -> subprocess.CompletedProcess:
    """A script of train_options/ from another directory; that it finds no images shows that it read its options."""
    script = ROOT / "train_options" / f"train_{name}.py"
    command = [sys.executable, *launcher, str(script), "--data-path=/no/such/images", "--model=DiT-S/8"]
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )


def test_each_preset_is_a_script_that_runs_in_place(tmp_path):
    done = start_preset("features", tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: --data-path /no/such/images does not exist")
    for words in ("import train", "import medart"):  # libraries say nothing while they load
        quiet = subprocess.run([sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True)
        assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    code = {}
    for name in PRESETS:
        source = (ROOT / "train_options" / f"train_{name}.py").read_text()
        assert f"train_options/train_{name}.py --model" in source
        code[name] = source.split('"""')[2].replace(f'"{name}"', "NAME")
    assert len(set(code.values())) == 1  # so that what holds for one of them holds for all


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "launcher"), [("original", "torch.distributed.run"), ("amp", "accelerate.commands.launch")]
)
def test_presets_run_under_the_launchers(tmp_path, name, launcher):
    flag = "--nproc_per_node=2" if "torch" in launcher else "--cpu"
    assert "error: --data-path /no/such/images does not" in start_preset(name, tmp_path, "-m", launcher, flag).stderr


@pytest.mark.slow
def test_two_processes_of_either_launcher_make_the_same_bytes(tmp_path, tiny_pixart, x_rays):
    script = tmp_path / "tiny.py"
    script.write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import tiny_dit, train\ntiny_dit.make_known()\nsys.exit(train.main())\n"
    )
    shared = [f"--model={tiny_dit.NAME}", f"--data-path={x_rays}", f"--vae={tiny_pixart}", "--image-size=32"]
    shared += ["--global-batch-size=4", "--max-steps=4", "--log-every=1", "--num-samples=0", "--report-to=none"]
    launchers = {"torch.distributed.run": ["--nproc_per_node=2"],
                 "accelerate.commands.launch": ["--multi_gpu", "--num_processes=2"]}  # fmt: skip
    runs = []
    for name, flags in launchers.items():
        command = [sys.executable, "-m", name, *flags, str(script), *shared, f"--results-dir={tmp_path / name}"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        runs.append(tmp_path / name / f"000-{RUN}")
    assert entries(runs[0]) == entries(runs[1]) and same(read(runs[0], 4)["opt"], read(runs[1], 4)["opt"])


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_trains(run, flags, tmp_path, name):
    assert run(*flags, "--max-steps=1", preset=name) == 0
    args = read(tmp_path / "results" / f"000-{RUN}", 1)["args"]
    assert {key: args[key] for key in PRESETS[name]} == PRESETS[name] and args["options"] == name


def test_the_first_process_tells_the_others(monkeypatch):
    assert stopping.from_first_process(torch.device("cpu"), 3, 0) == [3, 0]
