"""The folder of a run: what may start or go on in it, and checkpoints that are whole or absent."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from medart_core.errors import DISK_FAULTS, UserError

OPTIONS, FINISHED, MANIFEST, LOCK = "options.json", "finished.json", "manifest.json", ".lock"
TEMPORARY = ".unfinished-"
REPLACED = ".replaced-"
PREFIX = "checkpoint-"
GROWING = ("max_train_steps", "num_train_epochs")  # a resumed run may be longer than the first, never shorter


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


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole, line ends as they are."""
    part = path.with_name(f"{TEMPORARY}{path.name}")  # in the same folder, for a rename cannot cross file systems
    part.write_text(text, encoding="utf-8", newline="")
    _sync(part)
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file as a whole."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


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
    try:
        write(work)
        _seal_all(work)
    except Exception:
        shutil.rmtree(work, ignore_errors=True)  # half a checkpoint is of no use, and the disk may be full
        raise
    if target.exists():
        target.rename(replaced)
    work.rename(target)
    _sync(run_dir)
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def _seal_all(work: Path) -> None:
    written = sorted(work.rglob("*"))
    for path in written:
        if path.is_dir():
            _sync(path)
    seal(work / MANIFEST, [path for path in written if path.is_file()])


def seal(manifest: Path, files: Iterable[Path]) -> None:
    """Bring files below the manifest's folder to the disk, and list them there with their sums."""
    sums = {}
    for path in files:
        name = path.relative_to(manifest.parent).as_posix()
        sums[name] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
        _sync(path)
    write_json(manifest, sums)
    _sync(manifest.parent)


@contextlib.contextmanager
def disk_faults(run_dir: Path, safe: str = "its checkpoints are intact") -> Iterator[None]:
    """Turn a disk that takes no more (full, over quota, read-only, ...) into a UserError of one line; `safe` says
    what is not lost."""
    from safetensors import SafetensorError  # of a failed write it keeps the text only

    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in DISK_FAULTS and error.filename != str(run_dir):
            raise
        raise UserError(
            f"cannot write in {run_dir} ({error}); {safe}: make room or "
            "restore its permissions, and run the same command again"
        ) from error


def verify(folder: Path, manifest: str = MANIFEST, summed_bytes: float = math.inf) -> None:
    """Hold what was published in a folder against its manifest; of files above `summed_bytes` only the size.

    Raises:
        UserError: naming the file that is missing or damaged.
    """
    try:
        content = json.loads((folder / manifest).read_text())
        facts = [(folder / name, entry["bytes"], entry["sha256"]) for name, entry in content.items()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} has no readable {manifest}") from error
    for path, size, sha256 in facts:
        whole = path.is_file() and path.stat().st_size == size
        if not whole or (size <= summed_bytes and _sha256(path) != sha256):
            raise UserError(f"{path} is missing or damaged")


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Published checkpoints by step, oldest first."""
    found = [(path.name.removeprefix(PREFIX), path) for path in run_dir.glob(f"{PREFIX}*")]
    return sorted((int(step), path) for step, path in found if step.isdigit())


def latest(run_dir: Path, warn: bool = True) -> Path | None:
    """The newest checkpoint that is whole; a damaged one is passed over, and with `warn` named."""
    for _, path in reversed(checkpoints(run_dir)):
        try:
            verify(path)
            return path
        except UserError as error:
            if warn:
                print(f"warning: {error}: this checkpoint is passed over", file=sys.stderr, flush=True)
    return None


def prune(run_dir: Path, limit: int | None, published: Path) -> None:
    """Remove the oldest checkpoints beyond `limit`, at least 1; never `published`, the one that was just made.

    A later step may be there, damaged or of a branch that was given up; it must not push out the one that counts.
    """
    if limit is not None:
        others = [path for _, path in checkpoints(run_dir) if path.name != published.name]
        for path in others[: max(len(others) - (limit - 1), 0)]:
            doomed = path.rename(path.with_name(f"{TEMPORARY}{path.name}"))  # so that a kill leaves no half of it
            shutil.rmtree(doomed)


# --- What may start or go on in a folder ---


def finish(run_dir: Path, step: int, **facts: Any) -> None:
    """Mark the run as finished after `step` steps, and keep what sample.py needs to know of it."""
    write_json(run_dir / FINISHED, {"step": step, **facts})


def resume_decision(
    run_dir: Path, options: Mapping[str, Any], resume_from: str | None, free: frozenset[str], owner: bool = True
) -> Path | None:
    """Decide what a command does in `run_dir`: the checkpoint to go on from, or None for a fresh start.

    The same command resumes; `options` in `free` may change, the length of the run may grow. Nothing but the lock is
    written: `begin` does that. Of several processes one is the `owner`, who locks and writes, and whom the others
    follow. Raises UserError for a folder that holds something else, a run with other options, a finished run, a run
    that another trainer works on, or only damaged checkpoints.
    """
    options = json.loads(json.dumps(dict(options)))  # as they will be read back: a tuple becomes a list
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir} is a file; choose another --output_dir")
    if (run_dir / OPTIONS).exists():
        _check_same(run_dir, options, free)
        _check_length(run_dir, options)
    elif run_dir.exists():
        ours = (TEMPORARY, LOCK)
        foreign = sorted(path.name for path in run_dir.iterdir() if not path.name.startswith(ours))
        if foreign:
            raise UserError(f"{run_dir} holds other things ({foreign[0]}, ...); choose an empty --output_dir")
    asked = None if resume_from in (None, "latest") else Path(resume_from)
    if asked and not asked.exists() and (run_dir / asked).exists():
        asked = run_dir / asked
    if asked:
        _check_whole(asked)
        if (asked.parent / OPTIONS).exists():
            _check_same(asked.parent, options, free)
    elif resume_from and not run_dir.exists():
        raise UserError(f"no checkpoint in {run_dir} to resume from; leave --resume_from_checkpoint out")
    if owner:
        take(run_dir)
        clear_leftovers(run_dir)
    chosen = asked or latest(run_dir, warn=owner)
    if chosen is None and (resume_from or checkpoints(run_dir)):
        raise UserError(f"no whole checkpoint in {run_dir} to resume from; choose another --output_dir to start anew")
    return chosen


@contextlib.contextmanager
def begin(run_dir: Path, options: Mapping[str, Any], owner: bool = True) -> Iterator[None]:
    """Within it a run writes in its folder; faults of the disk become UserErrors of one line.

    From here on, and no sooner, the folder's options are the run's and a finished run that grows is unfinished: what
    fails before, such as the loading of a model, leaves the folder as it was.
    """
    with disk_faults(run_dir):
        if owner:
            write_json(run_dir / OPTIONS, dict(options))
            (run_dir / FINISHED).unlink(missing_ok=True)
        yield


def _check_whole(folder: Path) -> None:
    """Refuse a damaged checkpoint that was asked for by name, and name the newest whole one beside it."""
    try:
        verify(folder)
    except UserError as error:
        other = latest(folder.parent, warn=False)
        advice = f"--resume_from_checkpoint={other} is whole" if other else "leave --resume_from_checkpoint out"
        raise UserError(f"{error}; {advice}") from error


def take(run_dir: Path, *, work: str = "works", remedy: str = "choose another --output_dir") -> None:
    """Make `run_dir`, for this process alone until it ends, however it ends. Raises UserError if another one has it.

    A POSIX lock: forked loaders do not inherit it as they would flock's, and it holds across NFS.
    """
    import fcntl  # not on Windows, where sample.py shall still read a run

    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT)  # never closed, for that would free the lock
    except OSError as error:
        raise UserError(f"cannot write in {run_dir} ({error}); {remedy}") from error
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(f"another process {work} in {run_dir}; end it, or {remedy}") from error
        print(f"warning: {run_dir} cannot be locked ({error}); start no second run in it", file=sys.stderr, flush=True)


def read_json(path: Path, option: str = "--output_dir") -> dict[str, Any]:
    """The object in a JSON file of a run. Raises UserError, which tells to choose another `option`."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); choose another {option}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not of this program; choose another {option}")
    return content


def changes(before: Mapping[str, Any], now: Mapping[str, Any], free: frozenset[str] = frozenset()) -> list[str]:
    """Settings that are not as they were, as `name old -> new`, those in `free` left out."""
    names = sorted((before.keys() | now.keys()) - free)
    pairs = [(name, before.get(name), now.get(name)) for name in names]
    return [f"{name} {old} -> {new}" for name, old, new in pairs if old != new]


def _check_same(run_dir: Path, options: Mapping[str, Any], free: frozenset[str]) -> None:
    if changed := changes(read_json(run_dir / OPTIONS), options, free):
        raise UserError(
            f"{run_dir} holds a run with other options ({'; '.join(changed)}); choose another --output_dir, "
            "or give the options of that run to resume it"
        )


def _check_length(run_dir: Path, options: Mapping[str, Any]) -> None:
    """Refuse a run that would be shorter than what is there, or no longer than a finished one."""
    before = read_json(run_dir / OPTIONS)
    done = max((step for step, _ in checkpoints(run_dir)), default=0)
    finished = (run_dir / FINISHED).exists()
    if finished:
        done = max(done, int(read_json(run_dir / FINISHED).get("step", 0)))
    lengths = [(before.get(name), options.get(name)) for name in GROWING]
    steps = options.get("max_train_steps")
    if any(old is not None and new is not None and new < old for old, new in lengths) or (steps or done) < done:
        raise UserError(f"{run_dir} holds a longer run; --max_train_steps and --num_train_epochs may only grow")
    by_epochs = any(old is not None and new is not None and new > old for old, new in lengths[1:])
    if finished and not (by_epochs if steps is None else steps > done):
        raise UserError(
            f"{run_dir} holds a finished run of these options; choose another --output_dir, or raise --max_train_steps"
        )
