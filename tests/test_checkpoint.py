"""The run folder: exact round trips, checkpoints that are whole or absent, resume rules, full disks."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medart_core import checkpoint, trees
from medart_core.checkpoint import FINISHED, LOCK, OPTIONS
from medart_core.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
FREE = frozenset({"max_train_steps", "num_train_epochs", "logging_steps"})
OPTS = {"lr": 0.1, "betas": (0.9, 0.999), "max_train_steps": 10, "num_train_epochs": 15, "logging_steps": 5}


def round_trip(folder: Path, tree):
    trees.save_tree(folder / "tree", tree)
    return trees.load_tree(folder / "tree")


def assert_same(one, other) -> None:
    """Equal in structure, types and every bit."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert one.contiguous().view(-1).view(torch.uint8).tolist() == other.view(-1).view(torch.uint8).tolist()
    elif isinstance(one, dict):
        assert list(one) == list(other)
        assert [type(key) for key in one] == [type(key) for key in other]
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert repr(one) == repr(other)


def dtypes(tree) -> set[torch.dtype]:
    """Those of all tensors in nested dicts; bitsandbytes keeps its 8-bit moments in a dict inside the state."""
    if isinstance(tree, torch.Tensor):
        return {tree.dtype}
    return set().union(*map(dtypes, tree.values())) if isinstance(tree, dict) else set()


def put(run_dir: Path, step: int, content: str = "whole") -> Path:
    return checkpoint.publish(
        run_dir, f"checkpoint-{step}", lambda folder: void((folder / "data").write_text(content))
    )


def void(_) -> None:
    pass


def steps(run_dir: Path) -> list[int]:
    return [step for step, _ in checkpoint.checkpoints(run_dir)]


# --- trees ---


def test_trees_come_back_bit_for_bit(tmp_path: Path) -> None:
    shared = torch.randn(5)
    tree = {
        "shared": [shared, shared],
        0: {"step": torch.tensor(3.0), "empty": torch.empty(0), "bytes": torch.arange(256, dtype=torch.uint8)},
        "bf16": torch.randn(7).bfloat16(),
        "turned": torch.randn(2, 3).t(),
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "scalars": (None, True, 1, 0.1 + 0.2, 1e-323, float("inf"), "é\n", 2**70),
        "rng": torch.get_rng_state(),
        "nothing": [{}, [], ()],
        "tensor": "a key named like a mark",
    }
    assert_same(tree, round_trip(tmp_path, tree))


def test_what_a_tree_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="set"):
        trees.save_tree(tmp_path / "tree", {"a": {1, 2}})


def adamw8bit(parameters):
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=1e-2)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


@pytest.mark.parametrize("build", [adamw, adamw8bit])
def test_an_optimiser_goes_on_as_if_nothing_had_happened(tmp_path: Path, build) -> None:
    def training():
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 8192).view(64, 128))  # above 4,096: bitsandbytes' 8 bits
        return parameter, build([parameter])

    def train(parameter, optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            parameter.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(step))
            optimizer.step()

    straight, optimizer = training()
    train(straight, optimizer, 0, 6)

    parameter, optimizer = training()
    train(parameter, optimizer, 0, 3)
    state = {"parameter": parameter, "optimizer": optimizer.state_dict()}
    if build is adamw8bit:
        assert torch.uint8 in dtypes(state["optimizer"]["state"])
    state = round_trip(tmp_path, state)

    resumed, optimizer = training()
    resumed.data.copy_(state["parameter"])
    optimizer.load_state_dict(state["optimizer"])
    train(resumed, optimizer, 3, 6)
    assert torch.equal(resumed, straight)


# --- publishing ---


def test_a_published_folder_holds_its_files_and_their_sums(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "part").mkdir()
        (folder / "part" / "weights").write_bytes(b"123")

    path = checkpoint.publish(tmp_path, "checkpoint-5", write)
    assert (path / "part" / "weights").read_bytes() == b"123"
    checkpoint.verify(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-5"]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_named_and_the_older_checkpoint_used(tmp_path: Path, damage: str, capsys) -> None:
    put(tmp_path, 5)
    file = put(tmp_path, 10) / "data"
    if damage == "remove":
        file.unlink()
    else:
        file.write_text({"flip": "whale", "cut": "who"}[damage])
    with pytest.raises(UserError, match=r"checkpoint-10.data is missing or damaged$"):
        checkpoint.verify(file.parent)
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-5"
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("text", ["", "{", "[1]", "7", '{"data": 1}', '{"data": {}}'])
def test_a_damaged_manifest_is_a_users_error(tmp_path: Path, text: str) -> None:
    (put(tmp_path, 5) / checkpoint.MANIFEST).write_text(text)
    with pytest.raises(UserError, match="no readable manifest"):
        checkpoint.verify(tmp_path / "checkpoint-5")
    assert checkpoint.latest(tmp_path) is None


def test_checkpoints_are_ordered_by_number_and_others_ignored(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        put(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert steps(tmp_path) == [9, 20, 100]


def test_publishing_replaces_a_checkpoint_of_the_same_name(tmp_path: Path) -> None:
    put(tmp_path, 5, "old")
    assert (put(tmp_path, 5, "new") / "data").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-5"]


def test_an_error_while_writing_publishes_nothing(tmp_path: Path) -> None:
    put(tmp_path, 5, "old")

    def write(folder: Path) -> None:
        (folder / "data").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.publish(tmp_path, "checkpoint-5", write)
    checkpoint.verify(tmp_path / "checkpoint-5")
    assert (tmp_path / "checkpoint-5" / "data").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-5"]


KILLED = """
import os, sys
from pathlib import Path
from medart_core import checkpoint

def die(*_):
    os.kill(os.getpid(), 9)

def write(folder):
    (folder / "data").write_text("half")
    if sys.argv[2] == "write":
        die()

renamed = Path.rename
def rename(path, target):
    renamed(path, target)
    if sys.argv[2] == "rename":
        die()

Path.rename = rename
if sys.argv[2] == "manifest":
    checkpoint.write_json = die
checkpoint.publish(Path(sys.argv[1]), "checkpoint-10", write)
"""


@pytest.mark.parametrize("moment", ["write", "manifest", "rename"])
def test_a_kill_while_publishing_leaves_the_older_checkpoint(tmp_path: Path, moment: str) -> None:
    """`rename` is the moment between moving the old checkpoint-10 away and putting the new one in its place."""
    begin(tmp_path, OPTS)
    put(tmp_path, 5)
    put(tmp_path, 10, "old")
    child = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), moment], cwd=ROOT)
    assert child.returncode == -signal.SIGKILL
    assert list(tmp_path.glob(f"{checkpoint.TEMPORARY}*"))
    assert checkpoint.resume_decision(tmp_path, OPTS, None, FREE) == tmp_path / "checkpoint-10"
    assert (tmp_path / "checkpoint-10" / "data").read_text() == "old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [LOCK, "checkpoint-10", "checkpoint-5", OPTIONS]


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (5, 10, 20):
        published = put(tmp_path, step)
    checkpoint.prune(tmp_path, None, published)
    assert steps(tmp_path) == [5, 10, 20]
    checkpoint.prune(tmp_path, 2, published)
    assert steps(tmp_path) == [10, 20]
    checkpoint.prune(tmp_path, 9, published)
    assert steps(tmp_path) == [10, 20]


def test_prune_never_removes_the_one_just_published(tmp_path: Path) -> None:
    """A later, damaged checkpoint was passed over on resume; it must not push out what was made since."""
    put(tmp_path, 10)
    (put(tmp_path, 30) / "data").write_text("damaged")
    published = put(tmp_path, 20)
    checkpoint.prune(tmp_path, 1, published)
    assert steps(tmp_path) == [20]
    assert checkpoint.latest(tmp_path) == published


# --- resume rules ---


def begin(run_dir: Path, options: dict) -> Path | None:
    """What a run does in its folder before its first step."""
    chosen = checkpoint.resume_decision(run_dir, options, None, FREE)
    with checkpoint.begin(run_dir, options):
        return chosen


def start(run_dir: Path, **finished) -> None:
    """A run with OPTS that has one checkpoint, at step 10."""
    begin(run_dir, OPTS)
    put(run_dir, 10)
    if finished:
        checkpoint.finish(run_dir, finished["step"], prompts=[])


@pytest.mark.parametrize("change", [{}, {"logging_steps": 1}, {"max_train_steps": 20}, {"num_train_epochs": 16}])
def test_the_same_command_resumes(tmp_path: Path, change: dict) -> None:
    start(tmp_path)
    assert checkpoint.resume_decision(tmp_path, OPTS | change, None, FREE) == tmp_path / "checkpoint-10"
    assert checkpoint.resume_decision(tmp_path, OPTS | change, "latest", FREE) == tmp_path / "checkpoint-10"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.2}, r"other options \(lr 0\.1 -> 0\.2\)"),
        ({"betas": (0.5, 0.9)}, r"betas \[0\.9, 0\.999\] -> \[0\.5, 0\.9\]"),
        ({"added": 1}, r"added None -> 1"),
        ({"max_train_steps": 9}, "longer run"),
        ({"num_train_epochs": 14}, "longer run"),
    ],
)
def test_another_run_is_refused_by_name_and_left_alone(tmp_path: Path, change: dict, message: str) -> None:
    start(tmp_path)
    before = (tmp_path / OPTIONS).read_text()
    with pytest.raises(UserError, match=message) as caught:
        checkpoint.resume_decision(tmp_path, OPTS | change, None, FREE)
    assert "\n" not in str(caught.value)
    assert (tmp_path / OPTIONS).read_text() == before


def test_steps_below_what_is_done_are_refused(tmp_path: Path) -> None:
    by_epochs = OPTS | {"max_train_steps": None}
    begin(tmp_path, by_epochs)
    put(tmp_path, 10)
    with pytest.raises(UserError, match="longer run"):
        checkpoint.resume_decision(tmp_path, OPTS | {"max_train_steps": 3}, None, FREE)


def test_a_finished_run_is_not_repeated_but_may_grow(tmp_path: Path) -> None:
    start(tmp_path, step=10)
    for change in ({}, {"logging_steps": 1}, {"num_train_epochs": 20}):  # steps, where given, outrank epochs
        with pytest.raises(UserError, match=r"finished run.*another --output_dir, or raise --max_train_steps"):
            checkpoint.resume_decision(tmp_path, OPTS | change, None, FREE)
    assert (tmp_path / FINISHED).exists()
    longer = OPTS | {"max_train_steps": 11}
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir() if entry.is_file()}
    assert checkpoint.resume_decision(tmp_path, longer, None, FREE) == tmp_path / "checkpoint-10"
    # A model that cannot be loaded, say, leaves the finished run as it is.
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir() if entry.is_file()} == before
    begin(tmp_path, longer)
    assert not (tmp_path / FINISHED).exists()
    assert json.loads((tmp_path / OPTIONS).read_text())["max_train_steps"] == 11


@pytest.mark.parametrize("change", [{"num_train_epochs": 16}, {"max_train_steps": 11}])
def test_a_run_finished_by_epochs_may_grow(tmp_path: Path, change: dict) -> None:
    by_epochs = OPTS | {"max_train_steps": None}
    begin(tmp_path, by_epochs)
    checkpoint.finish(tmp_path, put(tmp_path, 10) and 10, prompts=[])
    with pytest.raises(UserError, match="finished run"):
        checkpoint.resume_decision(tmp_path, by_epochs, None, FREE)
    assert checkpoint.resume_decision(tmp_path, by_epochs | change, None, FREE) == tmp_path / "checkpoint-10"


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        checkpoint.resume_decision(tmp_path, OPTS, None, FREE)
    with pytest.raises(UserError, match="is a file"):
        checkpoint.resume_decision(tmp_path / "thesis.tex", OPTS, None, FREE)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("text", ["{", "[]"])
def test_unreadable_options_are_a_users_error(tmp_path: Path, text: str) -> None:
    (tmp_path / OPTIONS).write_text(text)
    with pytest.raises(UserError, match="choose another --output_dir"):
        checkpoint.resume_decision(tmp_path, OPTS, None, FREE)


def test_a_kill_while_the_options_were_written_is_a_fresh_start(tmp_path: Path) -> None:
    (tmp_path / f"{checkpoint.TEMPORARY}{OPTIONS}").write_text("{")
    assert begin(tmp_path, OPTS) is None
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [LOCK, OPTIONS]


def test_an_explicit_checkpoint_is_honoured_or_refused(tmp_path: Path) -> None:
    run, fresh = tmp_path / "run", tmp_path / "fresh"
    start(run)
    old = put(run, 5)
    assert checkpoint.resume_decision(run, OPTS, str(old), FREE) == old
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.resume_decision(fresh, OPTS, "latest", FREE)
    with pytest.raises(UserError, match="nowhere"):
        checkpoint.resume_decision(fresh, OPTS, str(tmp_path / "nowhere"), FREE)
    with pytest.raises(UserError, match=r"lr 0\.1 -> 0\.2"):
        checkpoint.resume_decision(fresh, OPTS | {"lr": 0.2}, str(old), FREE)
    assert not fresh.exists()
    assert checkpoint.resume_decision(fresh, OPTS, str(old), FREE) == old


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_never_resumed_and_the_one_before_it_is_offered(
    tmp_path: Path, damage, capsys
) -> None:
    start(tmp_path)
    file = put(tmp_path, 20, "weights") / "data"
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes({"flip": b"weighus", "cut": b"weigh"}[damage])  # t and u differ by one bit
    longer = OPTS | {"max_train_steps": 30}
    with pytest.raises(
        UserError, match=r"checkpoint-20.data is .* --resume_from_checkpoint=\S+checkpoint-10 is whole"
    ):
        checkpoint.resume_decision(tmp_path, longer, str(file.parent), FREE)
    assert not capsys.readouterr().err
    assert checkpoint.resume_decision(tmp_path, longer, None, FREE) == tmp_path / "checkpoint-10"
    [warning] = capsys.readouterr().err.splitlines()
    assert "checkpoint-20/data is missing or damaged" in warning and "passed over" in warning
    assert checkpoint.resume_decision(tmp_path, longer, None, FREE, owner=False) == tmp_path / "checkpoint-10"
    assert not capsys.readouterr().err


def test_a_run_with_damaged_checkpoints_only_is_not_begun_anew(tmp_path: Path) -> None:
    start(tmp_path)
    (tmp_path / "checkpoint-10" / "data").unlink()
    with pytest.raises(UserError, match="no whole checkpoint"):
        checkpoint.resume_decision(tmp_path, OPTS, None, FREE)
    with pytest.raises(UserError, match=r"damaged; leave --resume_from_checkpoint out$"):
        checkpoint.resume_decision(tmp_path, OPTS, str(tmp_path / "checkpoint-10"), FREE)


# --- one trainer in a folder, and a disk that takes it ---


TRAINER = """
import sys, time
from pathlib import Path
from medart_core import checkpoint

checkpoint.resume_decision(Path(sys.argv[1]), {}, None, frozenset())
print("in", flush=True)
time.sleep(60)
"""


def test_a_folder_has_one_trainer_until_that_one_ends(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout and child.stdout.readline() == "in\n"
        (tmp_path / f"{checkpoint.TEMPORARY}checkpoint-5").mkdir()
        with pytest.raises(UserError, match=r"^another process works in .*; end it, or choose another --output_dir$"):
            checkpoint.resume_decision(tmp_path, {}, None, frozenset())
        assert list(tmp_path.glob(f"{checkpoint.TEMPORARY}*"))  # the first one's work is not swept away
        child.kill()
    assert checkpoint.resume_decision(tmp_path, {}, None, frozenset()) is None
    assert not list(tmp_path.glob(f"{checkpoint.TEMPORARY}*"))


def test_a_folder_that_cannot_be_made_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write in .*file/run .*choose another --output_dir"):
        checkpoint.resume_decision(tmp_path / "file" / "run", OPTS, None, FREE)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_read_only_folder_is_a_users_error(tmp_path: Path, monkeypatch, number: int) -> None:
    """By a lock file that cannot be opened: modes do not keep root out."""
    start(tmp_path)

    def refuse(path, *_):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=rf"cannot write in .*{os.strerror(number)}.*choose another") as caught:
        checkpoint.resume_decision(tmp_path, OPTS, None, FREE)
    assert "\n" not in str(caught.value)


FULL = """
import resource, sys
from pathlib import Path
import torch
from medart_core import checkpoint, trees
from medart_core.errors import exit_codes

folder = Path(sys.argv[1])

def write(path):
    if sys.argv[2] == "tree":
        trees.save_tree(path / "state", {"weights": torch.zeros(100_000)})
    else:
        (path / "data").write_bytes(bytes(400_000))

with exit_codes(), checkpoint.disk_faults(folder):
    checkpoint.publish(folder, "checkpoint-5", write)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    checkpoint.publish(folder, "checkpoint-10", write)
"""


@pytest.mark.parametrize("kind", ["tree", "bytes"])
def test_a_full_disk_is_one_line_and_leaves_what_was_published(tmp_path: Path, kind: str) -> None:
    """A limit on the size of files stands in for it, for that needs no disk of its own."""
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path), kind], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: cannot write in {tmp_path} (") and "File too large" in line and "intact" in line
    checkpoint.verify(tmp_path / "checkpoint-5")
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-5"]


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), checkpoint.disk_faults(tmp_path):
        (tmp_path / "gone").read_text()
