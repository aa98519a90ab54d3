"""The folder of a run: what may start or go on in it, checkpoints that are whole or absent, and orderly stops."""

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from medart_core.errors import UserError

OPTIONS, FINISHED, MANIFEST = "options.json", "finished.json", "manifest.json"
TEMPORARY = ".unfinished-"
REPLACED = ".replaced-"
PREFIX = "checkpoint-"
GROWING = ("max_train_steps", "num_train_epochs")  # a resumed run may be longer than the first, never shorter


# --- Trees of tensors: nested dicts and lists as one safetensors file beside a JSON skeleton ---


def save_tree(path: Path, tree: Any) -> None:
    """Write `<path>.safetensors` and `<path>.json`; the tree holds dicts, lists, tuples, tensors and JSON scalars."""
    import torch
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}

    def skeleton(node: Any) -> Any:
        if isinstance(node, torch.Tensor):
            tensors[str(len(tensors))] = node.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {"tensor": str(len(tensors) - 1)}
        if isinstance(node, Mapping):  # as pairs: JSON would turn the optimiser's integer keys into strings
            return {"dict": [[key, skeleton(value)] for key, value in node.items()]}
        if isinstance(node, list | tuple):
            return {type(node).__name__: [skeleton(value) for value in node]}
        if node is None or isinstance(node, bool | int | float | str):
            return node
        raise TypeError(f"cannot save a {type(node).__name__} in a checkpoint")

    text = json.dumps(skeleton(tree))
    save_file(tensors, path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_text(text)


def load_tree(path: Path) -> Any:
    """Read back what `save_tree` wrote, bit for bit, on the CPU."""
    from safetensors.torch import load_file

    tensors = load_file(path.with_suffix(".safetensors"))

    def grow(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        [(kind, content)] = node.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "dict":
            return {key: grow(value) for key, value in content}
        return (tuple if kind == "tuple" else list)(grow(value) for value in content)

    return grow(json.loads(path.with_suffix(".json").read_text()))


# --- Publishing: a checkpoint appears by rename, when all of it is on the disk ---


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file as a whole."""
    part = path.with_name(f"{TEMPORARY}{path.name}")  # in the same folder, for a rename cannot cross file systems
    part.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    _sync(part)
    os.replace(part, path)


def clear_leftovers(run_dir: Path) -> None:
    """Undo what a kill while publishing has left: put a checkpoint moved away back, drop what is unfinished."""
    for path in run_dir.glob(f"{REPLACED}*"):
        target = run_dir / path.name.removeprefix(REPLACED)
        shutil.rmtree(path) if target.exists() else path.rename(target)
    for path in run_dir.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def publish(run_dir: Path, name: str, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a temporary folder, seal it with a manifest of sha256 sums, and rename it to `name`."""
    clear_leftovers(run_dir)
    work, target, replaced = run_dir / f"{TEMPORARY}{name}", run_dir / name, run_dir / f"{REPLACED}{name}"
    work.mkdir(parents=True)
    write(work)
    written = sorted(work.rglob("*"))
    files = [path for path in written if path.is_file()]
    manifest = {
        path.relative_to(work).as_posix(): {"sha256": _sha256(path), "bytes": path.stat().st_size} for path in files
    }
    for path in written:
        _sync(path)
    write_json(work / MANIFEST, manifest)
    _sync(work)
    if target.exists():
        target.rename(replaced)
    work.rename(target)
    _sync(run_dir)
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def verify(folder: Path) -> None:
    """Hold a published folder against its manifest. Raises UserError naming the file that is missing or damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        facts = [(folder / name, entry["bytes"], entry["sha256"]) for name, entry in manifest.items()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} has no readable {MANIFEST}; use another checkpoint") from error
    for path, size, sha256 in facts:
        if not path.is_file() or path.stat().st_size != size or _sha256(path) != sha256:
            raise UserError(f"{path} is missing or damaged; use another checkpoint")


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Published checkpoints by step, oldest first."""
    found = [(path.name.removeprefix(PREFIX), path) for path in run_dir.glob(f"{PREFIX}*")]
    return sorted((int(step), path) for step, path in found if step.isdigit())


def latest(run_dir: Path) -> Path | None:
    """The newest checkpoint that is whole; a damaged one is named and passed over."""
    for _, path in reversed(checkpoints(run_dir)):
        try:
            verify(path)
            return path
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)
    return None


def prune(run_dir: Path, limit: int | None, published: Path) -> None:
    """Remove the oldest checkpoints beyond `limit`, at least 1; never `published`, the one that was just made.

    A later step may be there, damaged or of a branch that was given up; it must not push out the one that counts.
    """
    if limit is not None:
        others = [path for _, path in checkpoints(run_dir) if path.name != published.name]
        for path in others[: max(len(others) - (limit - 1), 0)]:
            shutil.rmtree(path)


# --- What may start or go on in a folder ---


def finish(run_dir: Path, step: int, prompts: list[str]) -> None:
    """Mark the run as finished after `step` steps, and keep the prompts that it was shown with."""
    write_json(run_dir / FINISHED, {"step": step, "prompts": prompts})


def resume_decision(
    run_dir: Path, options: Mapping[str, Any], resume_from: str | None, free: frozenset[str]
) -> Path | None:
    """Decide what a command does in `run_dir`: the checkpoint to go on from, or None for a fresh start.

    `options` are kept in options.json. The same command resumes; options in `free` may change, the length of the run
    may grow. Raises UserError for a folder that holds something else, a run with other options or a finished run.
    """
    options = json.loads(json.dumps(dict(options)))  # as they will be read back: a tuple becomes a list
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir} is a file; choose another --output_dir")
    if (run_dir / OPTIONS).exists():
        _check_same(run_dir, options, free)
        _check_length(run_dir, options)
        clear_leftovers(run_dir)
    elif run_dir.exists():
        foreign = sorted(path.name for path in run_dir.iterdir() if not path.name.startswith(TEMPORARY))
        if foreign:
            raise UserError(f"{run_dir} holds other things ({foreign[0]}, ...); choose an empty --output_dir")
    if resume_from in (None, "latest"):
        chosen = latest(run_dir)
        if chosen is None and resume_from:
            raise UserError(f"no whole checkpoint in {run_dir} to resume from; leave --resume_from_checkpoint out")
    else:
        chosen = Path(resume_from)
        verify(chosen)
        if (chosen.parent / OPTIONS).exists():
            _check_same(chosen.parent, options, free)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / OPTIONS, options)
    (run_dir / FINISHED).unlink(missing_ok=True)
    return chosen


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); choose another --output_dir") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not of this program; choose another --output_dir")
    return content


def _check_same(run_dir: Path, options: Mapping[str, Any], free: frozenset[str]) -> None:
    before = _read(run_dir / OPTIONS)
    names = sorted((before.keys() | options.keys()) - free)
    pairs = [(name, before.get(name), options.get(name)) for name in names]
    changed = [f"{name} {old} -> {new}" for name, old, new in pairs if old != new]
    if changed:
        raise UserError(
            f"{run_dir} holds a run with other options ({'; '.join(changed)}); choose another --output_dir, "
            "or give the options of that run to resume it"
        )


def _check_length(run_dir: Path, options: Mapping[str, Any]) -> None:
    """Refuse a run that would be shorter than what is there, or no longer than a finished one."""
    before = _read(run_dir / OPTIONS)
    done = max((step for step, _ in checkpoints(run_dir)), default=0)
    finished = (run_dir / FINISHED).exists()
    if finished:
        done = max(done, int(_read(run_dir / FINISHED).get("step", 0)))
    lengths = [(before.get(name), options.get(name)) for name in GROWING]
    steps = options.get("max_train_steps")
    if any(old is not None and new is not None and new < old for old, new in lengths) or (steps or done) < done:
        raise UserError(f"{run_dir} holds a longer run; --max_train_steps and --num_train_epochs may only grow")
    by_epochs = any(old is not None and new is not None and new > old for old, new in lengths[1:])
    if finished and not (by_epochs if steps is None else steps > done):
        raise UserError(
            f"{run_dir} holds a finished run of these options; choose another --output_dir, or raise --max_train_steps"
        )


# --- Orderly stops ---


class StopSignal:
    """Turns SIGTERM and the first Ctrl-C into a request that the loop meets after the step at hand."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "StopSignal":
        self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    @property
    def requested(self) -> bool:
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells report it: 143 for SIGTERM."""
        return 128 + (self.received or signal.SIGTERM)


def end_with_launcher() -> None:
    """Make a worker of accelerate or torchrun stop, as by SIGTERM, when its launcher is gone."""
    if not any(name in os.environ for name in ("LOCAL_RANK", "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")):
        return
    launcher = os.getppid()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, see prctl(2)

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
