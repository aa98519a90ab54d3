"""Which images a run trains on, and which it holds out; chest X-rays, prepared when absent, if none are named."""

import subprocess
import sys
from pathlib import Path

from medart_core.data import Example, load_examples
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
            raise UserError("prepare.py chest-xray failed, see its message above; or name a folder of your own")
    return str(ROOT / name) if not Path(name).is_dir() and (ROOT / name).is_dir() else name


def held_out_folder(dataset_name: str) -> Path | None:
    """The split `val/` beside a training folder, if it is there."""
    folder = Path(dataset_name).resolve().parent / "val"
    tables = ("metadata.csv", "metadata.jsonl")
    return folder if Path(dataset_name).is_dir() and any((folder / table).is_file() for table in tables) else None


def load(
    dataset_name: str | None,
    validation_data_dir: str | None,
    *,
    max_train_samples: int | None,
    max_validation_samples: int,
    **reading,
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, every image checked; `reading` is passed on to `data.load_examples`.

    Held out are those of `validation_data_dir`, else of the split `val/` beside the training images, else none.

    Raises:
        UserError: if `validation_data_dir` is no folder, and as `data.load_examples` does.
    """
    if validation_data_dir and not Path(validation_data_dir).is_dir():
        raise UserError(f"--validation_data_dir {validation_data_dir} is no folder; correct its name, or leave it out")
    where = locate(dataset_name)
    examples = load_examples(where, max_samples=max_train_samples, **reading)
    folder = validation_data_dir or held_out_folder(where)
    if folder is None:
        return examples, []
    return examples, load_examples(str(folder), max_samples=max_validation_samples, **reading)
