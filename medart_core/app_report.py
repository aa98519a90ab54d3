"""What a folder of ours says to people: an evaluation's figures, a run's losses, and its pictures."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

from PIL import Image

from medart_core.app_root import LOG, MARKS, REPORT, Root
from medart_core.entries import whole_lines
from medart_core.errors import UserError
from medart_core.evaluation import report
from medart_core.evaluation.measured import Measured
from medart_core.images import open_image

MOST_PICTURES, MOST_BYTES = 12, 64 * 2**20
CURVES = {"loss": "loss", "loss_noise": "noise loss", "loss_color": "colour loss", "loss_validation": "held out"}
Table = tuple[str, list[tuple[int, str, float]]]  # as Markdown, and losses as (step, name, value)
SPEED = {"sec_per_step": "seconds per step", "steps_per_sec": "steps per second", "peak_mem_gb": "GB at most"}


@dataclass(frozen=True)
class Opened:
    """A folder's pictures with their names, its figures as Markdown, and its losses as (step, name, value)."""

    pictures: list[tuple[str, Image.Image]]
    figures: str
    curves: list[tuple[int, str, float]]


def open_folder(root: Root, name: str | None) -> Opened:
    """Read what there is to show.

    Raises:
        UserError: if the folder is not ours, lies or leads outside, or if a file in it is damaged.
    """
    folder = root.folder(name, MARKS)
    figures, curves = "", []
    for file, reader in ((folder / REPORT, _evaluation), (folder / LOG, _training), (folder / "demo.json", _demo)):
        if file.is_file():
            if file.stat().st_size > MOST_BYTES:
                raise UserError(f"{file.name} is larger than {MOST_BYTES >> 20} MB, too much for a page")
            try:
                table, losses = reader(file)
            except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
                raise UserError(f"{file.name} is damaged, or not of this project; make it again") from error
            figures, curves = figures + table, [*curves, *losses]
    return Opened(_pictures(folder), figures or "No figures, only pictures.", curves)


def _pictures(folder: Path) -> list[tuple[str, Image.Image]]:
    """Those of the folder itself, then the newest sample grids."""
    own = sorted(folder.glob("*.png"), key=lambda path: (path.stem.isdecimal(), path.name))
    files = [*own, *sorted((folder / "samples").glob("*.png"), reverse=True)]
    return [(file.stem.replace("-", " "), open_image(file, file.name)) for file in files[:MOST_PICTURES]]


def _evaluation(file: Path) -> Table:
    known = {field.name for field in fields(Measured)}
    figures = {
        name: Measured(**{key: value for key, value in figure.items() if key in known})
        for name, figure in json.loads(file.read_text("utf-8")).items()
        if name != "run"
    }
    return "\n".join([*report.table(figures), "", ""]), []


def _training(file: Path) -> Table:
    """First and last value of each figure of a training, and the losses step by step."""
    entries = [json.loads(line) for line in whole_lines(file)]
    lines, curves = [], []
    for key, title in (CURVES | SPEED).items():
        rows = [(entry["step"], entry[key]) for entry in entries if isinstance(entry.get(key), int | float)]
        if rows:
            lines.append(f"| {title} | {rows[0][1]:.4g} | {rows[-1][1]:.4g} | {rows[-1][0]} |")
            curves += [(step, title, value) for step, value in rows if key in CURVES]
    head = ["| training | first | last | at step |", "|---|---|---|---|"]
    return "\n".join([*head, *lines, "", ""]) if lines else "", curves


def _demo(file: Path) -> Table:
    lines = ["| colour errors against real images | distance | chroma |", "|---|---|---|"]
    for row, figures in json.loads(file.read_text("utf-8"))["errors"].items():
        lines.append(f"| {row} | {figures['color_distance']:.3f} | {figures['chroma_error']:.3f} |")
    return "\n".join([*lines, "", ""]), []
