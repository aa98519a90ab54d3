"""Put a LoRA where others find it: a folder with its files, a model card and a sample grid, or the same on the hub.

    python share.py medart --evaluation results/evaluation-001 --license cc-by-4.0 --data-license "CC BY 4.0"
    python share.py medart --push_to_hub USER/NAME --data-license "CC0 1.0"
    python share.py medart --push_to_hub USER/NAME --dry_run     shows what would be uploaded; needs no network

The folder holds pytorch_lora_weights.safetensors (diffusers, OneTrainer), comfyui.safetensors and README.md, nothing
of the training images, and no path: of a folder of yours its last name is told.
The hub's token is that of `hf auth login`, or HF_TOKEN.
"""

from medart_core.errors import UserError, exit_codes  # isort: skip (first, for a Ctrl-C while the rest loads)
import argparse
import re
import shlex
import sys
from pathlib import Path

import huggingface_hub

from medart_core import checkpoint, lora, model_card, tuned_model
from medart_core.images import open_image
from medart_core.options import Parser

ROOT = Path(__file__).resolve().parent
COMFYUI, GRID = "comfyui.safetensors", "samples.png"


def parse_options() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    what = parser.add_argument_group("what is shared")
    what.add_argument("lora", type=Path, metavar="LORA", help="output folder of medart.py, a checkpoint, or a file")
    what.add_argument("--title", help="of the card (default: the folder's name)")
    what.add_argument("--evaluation", type=Path, metavar="DIR", help="folder of evaluate.py, for its table")
    what.add_argument("--grid", type=Path, metavar="FILE", help="picture (default: the run's last sample grid)")
    what.add_argument("--license", metavar="ID", help="of these weights, as the hub calls it, such as cc-by-4.0")
    what.add_argument("--data-license", metavar="TEXT", help="of the training images; needed for the hub")
    where = parser.add_argument_group("where")
    where.add_argument("--out", type=Path, metavar="DIR", help="new folder (default: results/shared-NAME)")
    where.add_argument("--push_to_hub", "--push-to-hub", metavar="USER/NAME", help="upload the folder there")
    where.add_argument("--private", action="store_true", help="make the repository a private one")
    where.add_argument("--dry_run", "--dry-run", action="store_true", help="upload nothing, and say what it would be")
    options = parser.parse_args()
    if options.push_to_hub and not (options.data_license or options.dry_run):
        raise UserError("--push_to_hub publishes what images have taught; say under which licence: --data-license")
    if (options.dry_run or options.private) and not options.push_to_hub:
        raise UserError("--dry_run and --private are for an upload; add --push_to_hub USER/NAME, or leave them out")
    if options.push_to_hub and not re.fullmatch(r"[\w.-]+/[\w.-]+", options.push_to_hub):
        raise UserError(f"--push_to_hub is {options.push_to_hub}; give USER/NAME")
    if options.push_to_hub and not options.dry_run and not huggingface_hub.get_token():
        raise UserError("--push_to_hub finds no token of the hub; run hf auth login, or set HF_TOKEN")
    return options


def write_folder(options: argparse.Namespace, out: Path) -> None:
    """The LoRA's files, the grid and the card."""
    adapters = lora.read(options.lora)
    base = model_card.public(lora.base_model(adapters))
    settings = tuned_model.run_settings(options.lora) | {"base": base or "not recorded"}
    table = model_card.evaluation_lines(options.evaluation) if options.evaluation else ()
    grids = sorted((options.lora / "samples").glob("step-*.png"))
    grid = options.grid or (grids[-1] if grids else None)
    if grid and not grid.is_file():
        raise UserError(f"--grid {grid} does not exist; give a picture, or leave it out")
    out.mkdir(parents=True, exist_ok=True)
    lora.export(options.lora, out / lora.FILE_NAME, base=base)
    if not any(adapter.config.use_dora for adapter in adapters.values()):  # which ComfyUI reads otherwise
        lora.export(options.lora, out / COMFYUI, layout="comfyui", base=base)
    if grid:
        open_image(grid).save(out / GRID)
    prompt = (settings.get("prompts") or settings.get("validation_prompt") or ["..."])[0]
    model = f"--model PATH/TO/{base} " if base and "/" not in base else ""
    usage = [f'python sample.py {model}--lora {lora.FILE_NAME} --prompt "{prompt}"']
    card = model_card.text(
        options.title or out.name.removeprefix("shared-"),
        settings,
        int(settings.get("step") or 0),
        usage,
        grid=GRID if grid else None,
        evaluation=table,
        license=options.license,
        data_license=options.data_license,
    )
    (out / "README.md").write_text(card, encoding="utf-8")


def push(folder: Path, name: str, private: bool) -> str:
    """Upload a folder to the hub's repository `name`, made if it is not there; returns its address.

    Raises:
        UserError: if the hub cannot be reached, or does not let us.
    """
    try:
        url = huggingface_hub.HfApi().create_repo(name, private=private, exist_ok=True)
        huggingface_hub.HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="LoRA with model card")
    except Exception as error:  # of many types, from the network and from the hub
        said = getattr(error, "server_message", None) or str(error).strip() or type(error).__name__
        reason = said.splitlines()[0].rstrip(".")
        raise UserError(
            f"cannot upload to {name} ({reason}); check the name, the network and hf auth login; "
            f"the folder is ready: hf upload {name} {shlex.quote(str(folder))}"
        ) from error
    return str(url)


def main() -> None:
    options = parse_options()
    name = (options.lora.parent if options.lora.is_file() else options.lora).resolve().name
    out = options.out or ROOT / "results" / f"shared-{name}"
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder; choose another --out, or remove it")
    with checkpoint.disk_faults(out, "remove what is there"):
        write_folder(options, out)
    for file in sorted(out.iterdir()):
        print(f"{file.stat().st_size / 1e3:9,.0f} kB  {file.name}")
    if not options.push_to_hub:
        print(f"look at README.md in {out}, then share the folder: hf upload USER/NAME {shlex.quote(str(out))}")
    elif options.dry_run:
        print(f"would be uploaded to {options.push_to_hub}: {out}")
    else:
        print(f"uploaded: {push(out, options.push_to_hub, options.private)}")


if __name__ == "__main__":
    with exit_codes():
        sys.exit(main())
