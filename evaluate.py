"""Measure generated images against held-out real ones: quality, colour, usefulness, copies; report.json, report.md.

    python evaluate.py --generated results/sample-001 --real dataset/chest-xray/test --train dataset/chest-xray/train
    python evaluate.py --generated samples.npz --real dataset/chest-xray/test --num-images 200 --out results/mine
    python evaluate.py adm REF.npz SAMPLE.npz        the figures of ADM's evaluator, by its definitions
    torchrun --nproc_per_node=2 evaluate.py ...      the same numbers, sooner

Every figure comes with its interval, the floor that real images reach, the number of images and the sha256 of the
features' network. What cannot be measured is named, with what it needs. Nothing is downloaded.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

from medart_core import sources
from medart_core.errors import UserError, exit_codes
from medart_core.evaluation import adm, colour, figures, images, report, sheets
from medart_core.evaluation.colour import ColourExtractor
from medart_core.evaluation.features import extract, rank_and_size
from medart_core.evaluation.images import ImageSet
from medart_core.evaluation.inception import BY_HAND, RESIZE, Inception
from medart_core.evaluation.measured import Measured, compare_several
from medart_core.prepared import RECORD

ROOT = Path(__file__).resolve().parent
CACHE = ROOT / "dataset" / ".features"


def parse_options() -> argparse.Namespace:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--inception", type=Path, metavar="FILE", help="FID's network (default: prepare.py's)")
    shared.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="features are kept here by content")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[shared]
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument("--generated", type=Path, metavar="PATH", help="folder, or .npz with arr_0")
    what.add_argument("--real", type=Path, metavar="DIR", help="held-out real images, such as the split test/")
    what.add_argument("--train", type=Path, metavar="DIR", help="the images that the generator was trained on")
    what.add_argument("--num-images", type=int, metavar="N", help="generated images to take (default: all)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder (default: next results/evaluation-NNN)")
    parser.add_argument("--seed", type=int, default=0, help="of random references and halves (default: 0)")
    parser.add_argument("--resamples", type=int, default=50, metavar="N", help="halves for an interval (default: 50)")
    parser.add_argument("--resize", choices=RESIZE, default="antialias", help="for FID's network (tf1: as ADM has it)")
    commands = parser.add_subparsers(dest="command", metavar="adm")
    pair = commands.add_parser("adm", parents=[shared], help="IS, FID, sFID, precision and recall of two .npz files")
    pair.add_argument("reference", type=Path, metavar="REF.npz")
    pair.add_argument("samples", type=Path, metavar="SAMPLE.npz")
    options = parser.parse_args()
    if not options.command and not (options.generated and options.real):
        raise UserError("nothing to measure; give --generated and --real, or a command (see --help)")
    if not options.command and options.resamples < 2:
        raise UserError(f"--resamples is {options.resamples}; give at least 2")
    return options


# --- What is measured ---


def read_sets(options: argparse.Namespace) -> dict[str, ImageSet]:
    """The sets `generated`, `real` and perhaps `train`, all in the generated images' size.

    Raises:
        UserError: if they cannot be compared.
    """
    paths = {"generated": options.generated, "real": options.real, "train": options.train}
    paths = {side: path for side, path in paths.items() if path}
    if options.train and options.train.resolve() == options.real.resolve():
        raise UserError(f"--real and --train are both {options.real}; give --real held-out images, such as test/")
    if options.real.name == "train" and (options.real.parent / RECORD).is_file():
        raise UserError(f"{options.real} is the training folder; give --real {options.real.parent / 'test'}")
    shown = rank_and_size()[0] == 0
    sets = {side: images.read(path, show_progress=shown) for side, path in paths.items()}
    sets["generated"] = images.first(sets["generated"], options.num_images)
    sets["generated"] = sets["generated"].labelled_by_texts(sets["real"].classes)
    size = images.one_size(sets["generated"])
    images.refuse_unknown_classes(sets["generated"], sets["real"])
    images.refuse_overlap(sets["generated"], sets["real"], "take real images out of --generated")
    if "train" in sets:
        images.refuse_overlap(sets["real"], sets["train"], "split again: --real must be held out")
    return {side: found if side == "generated" else replace(found, size=size) for side, found in sets.items()}


def find_inception(options: argparse.Namespace, **settings: Any) -> Inception | None:
    """FID's network; None if it is not there and was not asked for by name."""
    file = options.inception or sources.INCEPTION_FILE
    if not options.inception and not file.is_file():
        return None
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    return Inception(file, device=torch.device("cuda", local_rank) if torch.cuda.is_available() else None, **settings)


def general_figures(
    network: Inception, rows: Mapping[str, np.ndarray], sets: Mapping[str, ImageSet], settings: dict[str, Any]
) -> dict[str, Measured]:
    """FID, KID, precision, recall, density, coverage and Inception score; FID and KID per class."""
    settings = settings | {"extractor": network.name, "sha256": network.sha256}
    pair = (rows["generated"], rows["real"])
    spare, note = rows.get("train"), figures.class_mix(sets)
    found = compare_several(figures.GENERAL, figures.of_general_features, *pair, spare=spare, note=note, **settings)
    found |= figures.score(network, {side: rows[side] for side in ("generated", "real")}, **settings)
    return found | figures.per_class(figures.PER_CLASS, figures.of_class_features, rows, sets, **settings)


def colour_figures(
    extractor: ColourExtractor, rows: Mapping[str, np.ndarray], settings: dict[str, Any]
) -> dict[str, Measured]:
    """The figures that HLDF is for; they need no network."""
    settings = settings | {"extractor": extractor.name, "sha256": extractor.sha256}
    pair = (rows["generated"], rows["real"])
    return compare_several(list(colour.FIGURES), figures.of_colours, *pair, spare=rows.get("train"), **settings)


def run_facts(options: argparse.Namespace, sets: Mapping[str, ImageSet]) -> dict[str, Any]:
    """What a reader needs to repeat the run."""
    facts: dict[str, Any] = {"generated": str(options.generated), "real": str(options.real)}
    for side, found in sets.items():
        facts |= {f"{side}_images": len(found), f"{side}_sha256": found.sha256}
    facts |= {"size": list(images.one_size(sets["generated"])), "resamples": options.resamples, "seed": options.seed}
    return facts | {"torch": torch.__version__, "numpy": np.__version__}


def write_sheets(out: Path, sets: Mapping[str, ImageSet], colours: Mapping[str, np.ndarray]) -> list[str]:
    """The pictures of the report."""
    sheets.class_grid(sets["generated"], sets["real"]).save(out / "grid.png")
    histograms = [colour.histograms(colours[side]) for side in ("generated", "real")]
    sheets.colour_histograms(*histograms).save(out / "colours.png")
    return ["grid.png", "colours.png"]


def choose_folder(out: Path | None) -> Path:
    """A folder without a report: finished ones are never overwritten."""
    if out is None:
        out = next(path for n in range(1, 10_000) if not (path := ROOT / "results" / f"evaluation-{n:03d}").exists())
    if (out / "report.json").exists():
        raise UserError(f"{out} holds a report already; choose another --out, or remove it")
    return out


# --- Commands ---


def compare_as_adm(options: argparse.Namespace) -> None:
    """Print the figures of two .npz files, the last line as JSON."""
    network = find_inception(options, rule="tf1", spatial=True)
    if network is None:
        raise UserError(f"ADM's figures need the Inception; {BY_HAND}")
    sides = [adm.read_side(path, network, options.cache) for path in (options.reference, options.samples)]
    if rank_and_size()[0] == 0:
        found = adm.figures(sides[0], sides[1], network)
        for name, figure in found.items():
            print(f"{name}: {figure.note if figure.value is None else f'{figure.value:.6g}'}")
        print(json.dumps({name: asdict(figure) for name, figure in found.items()}))


def evaluate(options: argparse.Namespace) -> None:
    """Extract features on all processes; measure and report on the first."""
    out = choose_folder(options.out)
    sets = read_sets(options)
    network, colours = find_inception(options, rule=options.resize), ColourExtractor()
    rows = {side: extract(found, colours, options.cache) for side, found in sets.items()}
    inception_rows = {side: extract(found, network, options.cache) for side, found in sets.items()} if network else {}
    if rank_and_size()[0] > 0:
        return

    settings = {"resamples": options.resamples, "seed": options.seed}
    print("measuring", flush=True)
    found = {}
    if network:
        found |= general_figures(network, inception_rows, sets, settings)
    else:
        found |= dict.fromkeys((*figures.GENERAL, "inception_score"), Measured(None, note=f"no Inception; {BY_HAND}"))
    found |= colour_figures(colours, rows, settings)

    out.mkdir(parents=True, exist_ok=True)
    file = report.write(out, found, run_facts(options, sets), write_sheets(out, sets, rows))
    print(*report.table(found), sep="\n")
    print(f"{file} with report.json and pictures beside it")


def main() -> None:
    options = parse_options()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        distributed.init_process_group("gloo")
    try:
        {None: evaluate, "adm": compare_as_adm}[options.command](options)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


if __name__ == "__main__":
    with exit_codes():
        sys.exit(main())
