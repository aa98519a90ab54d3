"""The data set that is used when none is named: chest X-rays, prepared when absent."""

import subprocess
import sys
from pathlib import Path

from medart_core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_DATA = "dataset/chest-xray/train"  # from the project's root


def locate(dataset_name: str | None) -> str:
    """The folder or hub id to read: a relative folder is looked for in the working directory, then in the project.

    Raises:
        UserError: if the default set has to be prepared first and that fails.
    """
    name = dataset_name or DEFAULT_DATA
    if dataset_name is None and not (ROOT / name / "metadata.csv").exists():
        print(f"{name} is not there yet: preparing it", flush=True)
        if subprocess.run([sys.executable, str(ROOT / "prepare.py"), "chest-xray"]).returncode:
            raise UserError("prepare.py chest-xray failed, see its message above; or give --dataset_name")
    return str(ROOT / name) if not Path(name).is_dir() and (ROOT / name).is_dir() else name


def held_out_folder(dataset_name: str) -> Path | None:
    """The split `val/` beside a training folder, if it is there."""
    folder = Path(dataset_name).resolve().parent / "val"
    tables = ("metadata.csv", "metadata.jsonl")
    return folder if Path(dataset_name).is_dir() and any((folder / table).is_file() for table in tables) else None
