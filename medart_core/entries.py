"""What every training run writes while it goes: log.jsonl, trackers and pictures, without doubles after a resume."""

import json
import math
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image

from medart_core.trackers import open_trackers


def peak_mem_gb() -> float:
    """Peak memory of this process so far in GB: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def whole_lines(file: Path) -> list[str]:
    """The lines of a JSON-lines file that a kill has not cut short."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [line for line in lines if line.startswith("{") and line.endswith("}")]


class Entries:
    """Figures by step, as JSON lines and in the trackers, and pictures in samples/."""

    def __init__(self, folder: Path, report_to: str, first_step: int):
        """Entries from `first_step` on are dropped: a resumed run writes them again."""
        self.folder, self.file = folder, folder / "log.jsonl"
        kept = [line for line in whole_lines(self.file) if json.loads(line)["step"] < first_step]
        self.file.write_text("".join(f"{line}\n" for line in kept))
        self.trackers = open_trackers(report_to, folder, first_step)

    def write(self, step: int, entry: Mapping[str, float | None]) -> None:
        """One line, null for what is unknown or infinite; the trackers get the other figures."""
        # JSON has no infinity, which is the gradient's norm where fp16 overflows.
        known = {name: value for name, value in entry.items() if value is not None and math.isfinite(value)}
        with open(self.file, "a") as file:
            file.write(json.dumps({"step": step, **dict.fromkeys(entry), **known}) + "\n")
        for tracker in self.trackers:
            tracker.scalars(step, known)

    def picture(self, step: int, picture: Image.Image) -> None:
        """Write samples/step-<step>.png."""
        (self.folder / "samples").mkdir(exist_ok=True)
        picture.save(self.folder / "samples" / f"step-{step:06d}.png")
        for tracker in self.trackers:
            tracker.picture(step, picture)

    def close(self) -> None:
        """Have the trackers write what they still hold."""
        for tracker in self.trackers:
            tracker.close()
