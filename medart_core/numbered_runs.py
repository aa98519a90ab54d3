"""The runs of train.py: folders numbered like results/000-DiT-XL-2, with checkpoints/0050000.pt in them.

Beside each .pt lie `0050000-resume.json`, what else an exact resumption needs, and `0050000-manifest.json`, which
comes last: without it a checkpoint does not count.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from medart_core import checkpoint
from medart_core.checkpoint import FINISHED, OPTIONS, TEMPORARY
from medart_core.errors import UserError

FOLDER = "checkpoints"
RESULTS = "--results_dir"


# --- Which folder a command works in ---


def choose(results: Path, name: str, options: Mapping[str, Any], max_steps: int, fresh: bool) -> tuple[int, int]:
    """Number of the run that a command works on, which is then locked, and the step of the checkpoint to go on from.

    That is the newest run of this name and these options that is not finished, or that ended before `max_steps`; else,
    or if `fresh`, a new one, whose step is 0; where unfinished runs of other options are passed over, one line names
    the one that differs least, and how. For one process.

    Raises:
        UserError: if another process works on it, or the folder cannot be written.
    """
    options = json.loads(json.dumps(dict(options)))  # as they will be read back
    passed_over: list[tuple[Path, list[str]]] = []
    for number, folder in reversed(_existing(results, name) if not fresh else []):
        finished = checkpoint.read_json(folder / FINISHED, RESULTS) if (folder / FINISHED).exists() else None
        if changed := checkpoint.changes(checkpoint.read_json(folder / OPTIONS, RESULTS), options):
            if finished is None:
                passed_over.append((folder, changed))
        elif finished is None or finished.get("step", 0) < max_steps:
            checkpoint.take(folder, remedy=f"choose another {RESULTS}")
            (folder / FOLDER).mkdir(exist_ok=True)
            checkpoint.clear_leftovers(folder / FOLDER)
            (folder / FINISHED).unlink(missing_ok=True)
            return number, latest(folder)
    if passed_over:
        folder, changed = min(passed_over, key=lambda other: len(other[1]))
        print(f"a new run: {folder} is unfinished, but of other options ({'; '.join(changed)})", flush=True)
    taken = [int(match[1]) for path in results.glob("*-*") if (match := re.match(r"(\d{3,})-", path.name))]
    number = max(taken, default=-1) + 1
    folder = folder_of(results, number, name)
    checkpoint.take(folder, remedy=f"choose another {RESULTS}")
    (folder / FOLDER).mkdir(exist_ok=True)
    checkpoint.write_json(folder / OPTIONS, dict(options))
    return number, 0


def folder_of(results: Path, number: int, name: str) -> Path:
    """The folder of a run."""
    return results / f"{number:03d}-{name}"


def _existing(results: Path, name: str) -> list[tuple[int, Path]]:
    """The runs of that name, oldest first."""
    pattern = re.compile(rf"(\d{{3,}})-{re.escape(name)}")
    found = [(match, path) for path in results.glob(f"*-{name}") if (match := pattern.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in found if (path / OPTIONS).is_file())


# --- Checkpoints ---


def file_of(folder: Path, step: int) -> Path:
    """The .pt of a step."""
    return folder / FOLDER / f"{step:07d}.pt"


def _resume(folder: Path, step: int) -> Path:
    return folder / FOLDER / f"{step:07d}-resume.json"


def _manifest(folder: Path, step: int) -> Path:
    return folder / FOLDER / f"{step:07d}-manifest.json"


def steps(folder: Path) -> list[int]:
    """Steps of the published checkpoints, oldest first."""
    return sorted(int(path.name.split("-")[0]) for path in (folder / FOLDER).glob("[0-9]*-manifest.json"))


def latest(folder: Path) -> int:
    """The step of the newest checkpoint that is whole, 0 if there is none; damaged ones are named and passed over.

    Raises:
        UserError: if there are checkpoints and none of them is whole.
    """
    found = steps(folder)
    for step in reversed(found):
        try:
            checkpoint.verify(folder / FOLDER, _manifest(folder, step).name)
            return step
        except UserError as error:
            print(f"warning: {error}: this checkpoint is passed over", file=sys.stderr, flush=True)
    if found:
        raise UserError(f"no whole checkpoint in {folder / FOLDER}; remove the folder, or start anew with --fresh")
    return 0


def publish(folder: Path, step: int, write: Callable[[BinaryIO], None], resume: Mapping[str, Any]) -> Path:
    """Let `write` fill the .pt of a step, and publish it with what else a resumption needs, the manifest last."""
    target, beside = file_of(folder, step), _resume(folder, step)
    part = target.with_name(f"{TEMPORARY}{target.name}")
    checkpoint.clear_leftovers(folder / FOLDER)
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except Exception as error:
        part.unlink(missing_ok=True)  # half a checkpoint is of no use, and the disk may be full
        if isinstance(error.__context__, OSError):  # which torch hides behind a complaint about its archive
            raise error.__context__ from error
        raise
    _manifest(folder, step).unlink(missing_ok=True)  # of a checkpoint that was found damaged
    os.replace(part, target)
    checkpoint.write_json(beside, dict(resume))
    checkpoint.seal(_manifest(folder, step), [target, beside])
    return target


def read_resume(folder: Path, step: int) -> dict[str, Any]:
    """What lies beside the .pt of a step for its resumption."""
    return checkpoint.read_json(_resume(folder, step), RESULTS)


def prune(folder: Path, limit: int | None, published: int) -> None:
    """Remove the oldest checkpoints beyond `limit`, at least 1; never the one of step `published`."""
    if limit is not None:
        others = [step for step in steps(folder) if step != published]
        for step in others[: max(len(others) - (limit - 1), 0)]:
            for path in (_manifest(folder, step), _resume(folder, step), file_of(folder, step)):
                path.unlink(missing_ok=True)
