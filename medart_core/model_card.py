"""The model card of a LoRA: what it was trained on, how, what was measured, and the licences."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from medart_core.errors import UserError
from medart_core.evaluation import report
from medart_core.evaluation.measured import Measured
from medart_core.journal import HEADER
from medart_core.sources import PACKAGES

ROOT = Path(__file__).resolve().parents[1]
NO_OPTIONS = (  # paths of the machine, and what stands elsewhere in the card
    "output_dir", "cache_dir", "validation_data_dir", "dry_run", "resume_from_checkpoint", "base", "dataset_name",
    "pretrained_model_name_or_path", "prompts", "step",
)  # fmt: skip
NOT_STATED = "not stated: ask before you share or use this"


def public(value: Any) -> Any:
    """A setting, or a list of them, as strangers may see it: of a folder or a path only the last name.

    Ids of the hub stay as they are, and so do the project's own models, named from its root: `nano/pixart`.
    """
    if isinstance(value, list):
        return [public(each) for each in value]
    if not isinstance(value, str) or not value:
        return value
    if (own := Path(os.path.normpath(ROOT / value))).is_relative_to(ROOT / "nano"):
        return own.relative_to(ROOT).as_posix()
    path = PureWindowsPath(value)  # which reads both kinds of separators
    is_path = path.root or value[0] in ".~" or (len(path.parts) > 2 and not any(map(str.isspace, value)))
    return (path.name or "folder") if is_path or os.path.exists(value) or os.path.exists(ROOT / value) else value


def text(
    title: str,
    settings: Mapping[str, Any],
    step: int,
    usage: Sequence[str],
    *,
    grid: str | None = None,
    evaluation: Sequence[str] = (),
    license: str | None = None,
    data_license: str | None = None,
) -> str:
    """The card as Markdown with the hub's front matter, fit for the public: no path of the machine is in it.

    Args:
        settings: the options of the run, and its base model as `base`.
        usage: commands.
        grid: the picture's path, as seen from the card.
        evaluation: lines of the report's table.
    """
    base = public(settings["base"])
    front = [f"base_model: {base}"] if "/" in base else []  # else a folder's name, of which the hub knows nothing
    front += [*([f"license: {license}"] if license else []), "pipeline_tag: text-to-image"]
    options = {name: public(value) for name, value in settings.items() if value is not None and name not in NO_OPTIONS}
    lines = [
        "---", *front, "tags: [text-to-image, pixart-alpha, lora, medical]", "---",
        f"# {title}", "",
        f"A LoRA of {base}: {step} steps of Med-Art's `medart.py`{'' if settings.get('no_hldf') else ' with HLDF'}. "
        "**Not for diagnosis.**", "",
        *([f"![samples, the same noise as before the first step]({grid})", ""] if grid else []),
        *(f"    {command}" for command in usage), "",
        "## Data and licences", "",
        f"- images: {data_of(settings)}; licence: {data_license or NOT_STATED}",
        f"- captions: {captions_of(settings)}",
        f"- base model: {base}, whose licence holds for what is made from it, see its card",
        f"- these weights: {license or NOT_STATED}", "",
        "## Measured", "",
        *(evaluation or ["Nothing was measured, or the report was not added."]), "",
        "## Options", "", "| option | value |", "|---|---|",
        *(f"| `{name}` | `{value}` |" for name, value in options.items()),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def data_of(settings: Mapping[str, Any]) -> str:
    """The name of the images; a split of a public set (prepare.py) with the name of that set."""
    name = settings.get("dataset_name") or "not recorded"
    *_, parent, last = ("", *Path(name).parts)
    return f"{parent}/{last}" if parent in PACKAGES else public(name)


def captions_of(settings: Mapping[str, Any]) -> str:
    """Which captions a run learned from, and who wrote them, as far as the data folder tells."""
    column = settings.get("caption_column") or "text"
    journal = ROOT / (settings.get("dataset_name") or "") / "captions.jsonl"
    if column == "text" and journal.is_file():
        with open(journal, encoding="utf-8") as lines:
            try:
                options = json.loads(lines.readline())[HEADER]["options"]
                writer = f"{public(options['model'])} (seed {options['seed']})"
                return f"column `{column}`, described by {writer} and checked"
            except (ValueError, LookupError, TypeError):
                pass
    return f"column `{column}`"


def evaluation_lines(folder: Path) -> list[str]:
    """The table of an evaluation's report.json.

    Raises:
        UserError: if there is none, or it cannot be read.
    """
    file = folder / "report.json"
    try:
        content = json.loads(file.read_text("utf-8"))
        fields = Measured.__dataclass_fields__
        figures = {
            name: Measured(**{key: value for key, value in figure.items() if key in fields})
            for name, figure in content.items() if name != "run"
        }  # fmt: skip
        return [f"N = {content['run']['generated_images']} generated images.", "", *report.table(figures)]
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{file} is no report of evaluate.py ({error}); give the folder that it wrote") from error
