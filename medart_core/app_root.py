"""The one folder that the web demo reads: what lies below it is found and shown, what lies outside is refused."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from medart_core import numbered_runs
from medart_core.checkpoint import FINISHED, OPTIONS, PREFIX
from medart_core.errors import UserError

DEPTH = 5  # folders below the root that are looked into: results/demo-dit/600-steps-seed-0/000-DiT-S-4 and one more
MANY = {"ablation-runs", "ablation-quick"}  # dozens of runs of a few steps; to look at them make them the root
NOT_LOOKED_INTO = {"dataset", "samples", "tensorboard", numbered_runs.FOLDER, *MANY}
ADAPTERS = ("transformer_lora/adapter_config.json", "text_encoder_lora/adapter_config.json")
WITHOUT_HLDF = r"[/-]without[_-]hldf$"  # what is added to a run's name for its twin
LOG, REPORT = "log.jsonl", "report.json"
MARKS = (REPORT, LOG, "samples.csv")  # of what the report tab can open


class Lora(NamedTuple):
    """A LoRA below the root: its folder's name from there, whether HLDF took part, its steps and its prompts."""

    name: str
    hldf: bool
    steps: int | None
    prompts: list[str]
    base: str | None

    @property
    def title(self) -> str:
        steps = f", {self.steps} steps" if self.steps else ""
        return f"{'with' if self.hldf else 'without'} HLDF{steps} ({self.name})"


def first_choice(loras: Sequence[Lora]) -> list[str]:
    """Names of a run without HLDF and of its twin with it, as the demo and nano/ have them; else of the first LoRA."""
    names = [lora.name for lora in loras]
    for lora in loras:
        twin = re.sub(WITHOUT_HLDF, "", lora.name)
        if not lora.hldf and twin != lora.name and twin in names:
            return [lora.name, twin]
    return names[:1]


@dataclass(frozen=True)
class Root:
    """A folder, and the paths in it by their names from there.

    `path` is absolute and without links; `given` is how it was named, "" for the project's own, to repeat commands.
    """

    path: Path
    given: str = ""

    def told(self, name: str) -> str:
        """How a command in the project's folder names what lies here."""
        return f"{self.given}/{name}" if self.given else name

    def inside(self, name: str | Path) -> Path:
        """The path that `name` means, all links followed.

        Raises:
            UserError: if that lies outside, whether or not there is something.
        """
        try:
            found = (self.path / name).resolve()
            found.exists()
        except (OSError, ValueError, RuntimeError):  # a loop of links, a zero byte, a name that is too long
            found = None
        if found is None or not found.is_relative_to(self.path):
            raise UserError(f"{str(name)!r} is outside of the folder that this page may read; choose from the list")
        return found

    def folder(self, name: str | None, wanted: Sequence[str] = ADAPTERS) -> Path:
        """The folder `name`, which has one of the `wanted` files and no link that leads outside.

        Raises:
            UserError: if it is none, or lies outside.
        """
        if not (name or "").strip():
            raise UserError("no folder is chosen; choose one from the list")
        found = self.inside(str(name).strip())
        if not any((found / file).is_file() for file in wanted):
            raise UserError(f"{name!r} is no folder of a run, an evaluation or samples; choose one from the list")
        for path in found.rglob("*"):
            self.inside(path)
        return found

    def _folders(self) -> Iterator[Path]:
        for folder, below, _ in os.walk(self.path):
            depth = len(Path(folder).relative_to(self.path).parts)
            looked_into = [name for name in below if name[0] != "." and name not in NOT_LOOKED_INTO]
            below[:] = sorted(name for name in looked_into if not name.startswith(PREFIX)) if depth < DEPTH else []
            yield Path(folder)

    def _name(self, folder: Path) -> str:
        return folder.relative_to(self.path).as_posix()

    def loras(self) -> list[Lora]:
        """What medart.py has left, the runs without HLDF first."""
        found = []
        for folder in self._folders():
            configs = [folder / name for name in ADAPTERS if (folder / name).is_file()]
            if configs:
                facts = _read(folder / OPTIONS) | _read(folder / FINISHED)
                base = _read(configs[0]).get("base_model_name_or_path")
                prompts = [text for text in facts.get("prompts") or [] if isinstance(text, str)]
                found.append(Lora(self._name(folder), not facts.get("no_hldf"), facts.get("step"), prompts, base))
        return sorted(found, key=lambda lora: (lora.hldf, lora.name))

    def checkpoints(self) -> list[tuple[str, str]]:
        """Title and name of the last DiT checkpoint of each run of train.py, the newest file first."""
        runs = [folder for folder in self._folders() if (folder / numbered_runs.FOLDER).is_dir()]
        last = [(run, steps[-1]) for run in runs if (steps := numbered_runs.steps(run))]
        last.sort(key=lambda found: numbered_runs.file_of(*found).stat().st_mtime, reverse=True)
        return [
            (f"{run.name}, step {step} ({self._name(run.parent)})", self._name(numbered_runs.file_of(run, step)))
            for run, step in last
        ]

    def checkpoint(self, name: str | None) -> Path:
        """The DiT checkpoint `name`. Raises UserError if it is none, or lies outside."""
        file = self.inside(name or "")
        if not (file.suffix == ".pt" and file.is_file()):
            raise UserError(f"there is no DiT checkpoint {name!r}; choose one from the list")
        return file

    def reports(self) -> list[str]:
        """Folders that the report tab can open: runs, evaluations, samples."""
        return [self._name(folder) for folder in self._folders() if any((folder / mark).is_file() for mark in MARKS)]


def _read(file: Path) -> dict:
    """A small JSON object; empty where there is none: one damaged folder does not hide the others."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
