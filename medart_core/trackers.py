"""Where curves and sample grids go besides log.jsonl: TensorBoard and Weights & Biases behind one small interface."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from medart_core.errors import UserError


class Tracker(Protocol):
    """Takes in figures and pictures by optimiser step."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
    def picture(self, step: int, picture: Image.Image) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in `<run>/tensorboard`; what an earlier attempt wrote from `first_step` on is hidden."""

    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, picture: Image.Image) -> None:
        self.writer.add_image("samples", np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of the project `medart` named like the folder; its id is kept there, so that a resumed run goes on in it.

    wandb reads its own environment: WANDB_PROJECT, WANDB_MODE=offline, WANDB_API_KEY.
    """

    def __init__(self, folder: Path):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(
                "--report_to wandb needs the package wandb: pip install wandb, or use tensorboard"
            ) from error
        self.wandb, kept = wandb, folder / "wandb-run-id.txt"
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "medart"),
            name=folder.name,
            dir=str(folder),
            id=kept.read_text().strip() if kept.exists() else None,
            resume="allow",
        )
        kept.write_text(self.run.id)
        self.run.define_metric("*", step_metric="step")  # a resumed run repeats steps, which wandb's own count forbids

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **values})

    def picture(self, step: int, picture: Image.Image) -> None:
        self.run.log({"step": step, "samples": self.wandb.Image(picture)})

    def close(self) -> None:
        self.run.finish()


def open_trackers(report_to: str, folder: Path, first_step: int) -> list[Tracker]:
    """The trackers that `tensorboard`, `wandb`, `all` or `none` stands for."""
    trackers: list[Tracker] = []
    if report_to in ("wandb", "all"):
        trackers.append(WeightsAndBiases(folder))
    if report_to in ("tensorboard", "all"):
        trackers.append(TensorBoard(folder, first_step))
    return trackers
