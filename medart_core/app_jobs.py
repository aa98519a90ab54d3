"""A request of the web demo while it runs: counted, stopped when told; and what a person may take away of it."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from medart_core.pictures import image_grid

KEPT_SECONDS = 3600


class Stopped(Exception):
    """The person at the page wants no more of it."""


class Job:
    """The steps of one request, told to `progress` as ((done, all), what)."""

    def __init__(self, total: int, progress: Callable[[tuple[int, int], str], Any]):
        self.total, self.done, self.progress = total, 0, progress
        self.stopping = threading.Event()
        self.started = time.perf_counter()

    def step(self, what: str) -> None:
        """Count a step that is about to be done. Raises Stopped if it is not wanted any more."""
        if self.stopping.is_set():
            raise Stopped(f"stopped after {self.done} of {self.total} steps")
        self.progress((self.done, self.total), what)
        self.done += 1

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started


class Jobs:
    """The job that each page is busy with; one at a time, since one at a time is let through to the models."""

    def __init__(self) -> None:
        self._busy: dict[str, Job] = {}

    def begin(self, page: str | None, total: int, progress: Callable[[tuple[int, int], str], Any]) -> Job:
        """A new job of a page, known by its session."""
        self._busy[str(page)] = Job(total, progress)
        return self._busy[str(page)]

    def stop(self, page: str | None) -> None:
        """Let the job of a page end before its next step."""
        if job := self._busy.pop(str(page), None):
            job.stopping.set()


class Kept(NamedTuple):
    """Files of a request: its picture, or all of them side by side, and the settings."""

    picture: Path
    settings: Path


class Outbox:
    """A folder for what can be taken away, emptied of what is an hour old."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def keep(self, name: str, pictures: Mapping[str, Image.Image], settings: Mapping[str, Any]) -> Kept:
        """Write pictures, by their titles, and the settings as `name`.json."""
        for old in self.folder.iterdir():
            if time.time() - old.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
        here = self.folder / f"{time.time_ns()}"
        here.mkdir()
        whole = here / f"{name}.png"
        (*_, single) = pictures.values()
        (single if len(pictures) == 1 else _side_by_side(pictures)).save(whole)
        record = here / f"{name}.json"
        record.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return Kept(whole, record)


def _side_by_side(pictures: Mapping[str, Image.Image]) -> Image.Image:
    width = next(iter(pictures.values())).width
    return image_grid([list(pictures.values())], column_names=list(pictures), cell=max(width, 160))
