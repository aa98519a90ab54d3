"""Measure generated images against held-out real ones: quality, colour, usefulness, copies; report.html, report.json.

    python evaluate.py --generated results/sample-001 --real dataset/chest-xray/test --train dataset/chest-xray/train
    python evaluate.py --generated samples.npz --real dataset/chest-xray/test --num-images 200 --out results/mine
    python evaluate.py fit-extractor --train dataset/chest-xray/train --out results/xray.safetensors
    python evaluate.py adm REF.npz SAMPLE.npz        the figures of ADM's evaluator, by its definitions
    torchrun --nproc_per_node=2 evaluate.py ...      the same numbers, sooner

Every figure comes with its interval, the floor that real images reach, the number of images and the sha256 of the
features' network. What cannot be measured is named, with what it needs. Nothing is downloaded.
"""

from medart_core.errors import UserError, exit_codes  # isort: skip (first, for a Ctrl-C while the rest loads)
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
from medart_core.checkpoint import disk_faults
from medart_core.evaluation import adm, classifier, figures, images, page, report, sheets
from medart_core.evaluation.colour import ColourExtractor
from medart_core.evaluation.features import extract_all, rank_and_size
from medart_core.evaluation.figures import PixelExtractor
from medart_core.evaluation.images import ImageSet
from medart_core.evaluation.inception import BY_HAND, RESIZE, Inception
from medart_core.evaluation.measured import needs_spare
from medart_core.evaluation.reidentification import patients_of
from medart_core.options import Parser
from medart_core.prepared import RECORD

ROOT = Path(__file__).resolve().parent
CACHE = ROOT / "dataset" / ".features"


def parse_options() -> argparse.Namespace:
    shared = Parser(add_help=False)
    shared.add_argument("--inception", type=Path, metavar="FILE", help="FID's network (default: prepare.py's)")
    shared.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="(default: dataset/.features)")
    parser = Parser(description=__doc__, parents=[shared])
    what = parser.add_argument_group("what is measured")
    what.add_argument("--generated", type=Path, metavar="PATH", help="folder, or .npz with arr_0")
    what.add_argument("--real", type=Path, metavar="DIR", help="held-out real images, such as the split test/")
    what.add_argument("--train", type=Path, metavar="DIR", help="the images that the generator was trained on")
    what.add_argument("--num-images", type=int, metavar="N", help="generated images to take (default: all)")
    what.add_argument("--extractor", type=Path, metavar="FILE", help="of fit-extractor, for the domain's own distance")
    how = parser.add_argument_group("how it is measured, and where to")
    how.add_argument("--utility-seeds", type=int, default=5, metavar="N", help="fits per kind of data (default: 5)")
    how.add_argument("--no-patients", action="store_true", help="do not look for training patients (chest X-rays)")
    how.add_argument("--seed", type=int, default=0, help="of random references and halves (default: 0)")
    how.add_argument("--resamples", type=int, default=50, metavar="N", help="halves for an interval (default: 50)")
    how.add_argument("--resize", choices=RESIZE, default="antialias", help="for FID's network (tf1: as ADM has it)")
    how.add_argument("--out", type=Path, metavar="DIR", help="new folder (default: next results/evaluation-NNN)")
    how.add_argument("--fail-on-copies", action="store_true", help="exit with 4 if images copy training images")
    commands = parser.add_subparsers(dest="command", metavar="fit-extractor | adm")
    usage = "python evaluate.py fit-extractor --train dataset/chest-xray/train --out results/xray.safetensors"
    fit = commands.add_parser("fit-extractor", help="fit the classifier of the domain's distance", epilog=usage)
    fit.add_argument("--train", type=Path, required=True, metavar="DIR", help="real training images with classes")
    fit.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .safetensors to write")
    fit.add_argument("--epochs", type=int, default=30, metavar="N", help="at most (default: 30)")
    fit.add_argument("--seed", type=int, default=0, help="of the fit (default: 0)")
    pair = commands.add_parser("adm", parents=[shared], help="IS, FID, sFID, precision, recall of two .npz files")
    pair.add_argument("reference", type=Path, metavar="REF.npz", help="images (arr_0) or moments")
    pair.add_argument("samples", type=Path, metavar="SAMPLE.npz", help="images (arr_0)")
    options = parser.parse_args()
    if not options.command and not (options.generated and options.real):
        raise UserError("nothing to measure; give --generated and --real, or a command (see --help)")
    for name, least in (("resamples", 2), ("utility_seeds", 0), ("num_images", 1), ("epochs", 1)):
        if (value := getattr(options, name, None)) is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}; give at least {least}")
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


def device() -> torch.device:
    """This process's GPU, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def find_inception(options: argparse.Namespace, **settings: Any) -> Inception | None:
    """FID's network; None if it is not there and was not asked for by name."""
    file = options.inception or sources.INCEPTION_FILE
    if not options.inception and not file.is_file():
        return None
    return Inception(file, device=device(), **settings)


def refuse_extractor(judge: classifier.Classifier, real: ImageSet) -> None:
    """Raise UserError if a classifier was fitted on these very images, or does not know their classes."""
    if judge.facts.get("images_sha256") == replace(real, size=None).sha256:
        raise UserError(f"--extractor was fitted on {real.source}; fit one on the training images")
    if unknown := sorted(set(real.classes) - set(judge.classes)):
        raise UserError(
            f"--extractor knows {', '.join(judge.classes)}, but not {unknown[0]!r}; fit one on such images"
        )


def run_facts(options: argparse.Namespace, sets: Mapping[str, ImageSet]) -> dict[str, Any]:
    """What a reader needs to repeat the run."""
    facts: dict[str, Any] = {"generated": str(options.generated), "real": str(options.real)}
    for side, found in sets.items():
        resized = sum(size != found.size for size in found.sizes) if found.size else 0
        facts |= {f"{side}_images": len(found), f"{side}_resized": resized, f"{side}_sha256": found.sha256}
    facts |= {"size": list(images.one_size(sets["generated"])), "resamples": options.resamples, "seed": options.seed}
    return facts | {"torch": torch.__version__, "numpy": np.__version__}


def choose_folder(out: Path | None) -> Path:
    """A folder without a report: finished ones are never overwritten."""
    if out is None:
        out = next(path for n in range(1, 10_000) if not (path := ROOT / "results" / f"evaluation-{n:03d}").exists())
    if out.is_file() or (out / "report.json").exists():
        raise UserError(f"{out} {'is a file' if out.is_file() else 'holds a report already'}; choose another --out")
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


def fit_extractor(options: argparse.Namespace) -> None:
    """Fit the classifier whose features the domain's Frechet distance is taken of."""
    train = images.read(options.train)
    if not train.labels:
        raise UserError(f"{options.train} has no classes; name them in metadata.csv or by folders")
    if options.out.exists():
        raise UserError(f"{options.out} is there already; choose another --out, or remove it")
    fitted = classifier.fit(
        train.batches(),
        train.labels,
        classes=train.classes,
        seed=options.seed,
        epochs=options.epochs,
        device=device(),
        groups=patients_of(train.names),
        show_progress=True,
    )
    fitted.facts["images_sha256"] = train.sha256
    fitted.save(options.out)
    facts = fitted.facts
    print(f"{options.out}: right on {facts['held_out_accuracy']:.1%} of {facts['held_out_images']} held-out images")


def evaluate(options: argparse.Namespace) -> int:
    """Extract features on all processes; measure and report on the first. Returns the exit code."""
    out = choose_folder(options.out)
    network, colours = find_inception(options, rule=options.resize), ColourExtractor()
    judge = classifier.Classifier.load(options.extractor, device()) if options.extractor else None
    sets = read_sets(options)
    if judge:
        refuse_extractor(judge, sets["real"])
    held_out = {side: sets[side] for side in ("generated", "real")}
    few = needs_spare(len(sets["generated"]), len(sets["real"]))  # then training images serve for the floor
    quality_rows = extract_all(sets if few else held_out, network, options.cache)
    domain_rows = extract_all(held_out, judge, options.cache)
    colour_rows = extract_all(sets, colours, options.cache)
    pixel_rows = extract_all(sets if "train" in sets else {}, PixelExtractor(), options.cache)
    if rank_and_size()[0] > 0:
        return 0

    print("measuring", flush=True)
    settings = {"resamples": options.resamples, "seed": options.seed}
    found = figures.quality(network, quality_rows, sets, **settings)
    found |= figures.domain(judge, domain_rows, **settings)
    found |= figures.colours(colours, colour_rows, **settings)
    privacy, pairs, copies = figures.copying(pixel_rows, sets)
    found |= privacy
    known = figures.examples(sets)
    found |= figures.agreement(judge, known)
    found |= figures.described(sets)
    if not options.no_patients:
        found |= figures.recognised(known, options.seed, device=device(), show_progress=True)
    found |= figures.usefulness(known, options.utility_seeds, device=device(), show_progress=True)

    facts = run_facts(options, sets)
    with disk_faults(out, "the features are kept"):
        out.mkdir(parents=True, exist_ok=True)
        pictures = sheets.write(out, sets, colour_rows, pairs)
        file = page.write(out, found, facts, sets, colour_rows, pairs)
        report.write(out, found, facts, pictures)
    print(*report.in_short(found), sep="\n")
    print(f"{file}: a page to look at; report.md, report.json and pictures lie beside it")
    if copies and options.fail_on_copies:
        print(f"{len(copies)} of {len(sets['generated'])} images copy training images, see {out}", file=sys.stderr)
        return 4
    return 0


def main() -> int:
    options = parse_options()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        distributed.init_process_group("gloo")
    try:
        return {None: evaluate, "adm": compare_as_adm, "fit-extractor": fit_extractor}[options.command](options) or 0
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


if __name__ == "__main__":
    with exit_codes():
        sys.exit(main())
