"""Make dataset/<name>/{train,val,test} with images, raw.csv and metadata.csv from a known source of labelled images.

    python prepare.py chest-xray
    python prepare.py dermoscopy-patches
    python prepare.py histology
    python prepare.py kvasir kvasir-dataset-v2.zip
    python prepare.py isic ISIC-2017_Training_Data.zip --csv ISIC-2017_Training_Part3_GroundTruth.csv
    python prepare.py ham10000 HAM10000/
    python prepare.py folder my-images.zip --name mine --caption "An image of {label}"
    python prepare.py inception               the network that evaluate.py computes FID with (81 MB)

A group (a patient, a lesion, near-identical frames, or what --group-pattern finds in a file name) never crosses a
split. A second run does nothing.
"""

from medart_core.errors import UserError, exit_codes  # isort: skip (first, for a Ctrl-C while the rest loads)
import argparse
import re
import sys
from functools import partial
from pathlib import Path

from medart_core import labelled_sets, packaged_sets, prepared, sources
from medart_core.options import Parser
from medart_core.prepared import Picture

ROOT = Path(__file__).resolve().parent

PACKAGED = {
    "chest-xray": (packaged_sets.chest_xrays, packaged_sets.XRAY_CAPTION),
    "dermoscopy-patches": (packaged_sets.dermoscopy_patches, packaged_sets.PATCH_CAPTION),
    "histology": (packaged_sets.histology, packaged_sets.TILE_CAPTION),
}
PACKAGES_OF = {"histology": ("histology", "scikit-image")}  # of the sets that need more than the package of their name
ON_DISK = {
    "kvasir": ("An endoscopic image of {label}", "Kvasir v2, its 8 class folders", "kvasir-dataset-v2.zip"),
    "isic": (
        "A dermoscopic image of {label}", "images of ISIC 2017 with the ground truth of task 3",
        "ISIC-2017_Training_Data.zip --csv ISIC-2017_Training_Part3_GroundTruth.csv",
    ),
    "ham10000": ("A dermoscopic image of {label}", "images of HAM10000 with HAM10000_metadata.csv", "HAM10000/"),
    "folder": (
        "A medical image of {label}", "any images, one folder per class",
        'my-images.zip --name mine --caption "A fundus image of {label}" --group-pattern "patient(\\d+)"',
    ),
}  # fmt: skip


def parse_options() -> argparse.Namespace:
    common = Parser(add_help=False)
    common.add_argument(
        "--root", type=Path, default=ROOT / "dataset", help="where the set's folder is made (default: dataset)"
    )
    common.add_argument("--seed", type=int, default=0, help="of the split (default: 0)")
    parser = Parser(description=__doc__)
    parser.set_defaults(path=None, csv=None, group_pattern=None)
    sets = parser.add_subparsers(dest="set", required=True, metavar=" | ".join([*PACKAGED, *ON_DISK, "inception"]))
    for name, (_, caption) in PACKAGED.items():
        source = " and ".join(sources.PACKAGES[package].requirement for package in PACKAGES_OF.get(name, (name,)))
        example = f"python prepare.py {name} --root /data/sets"
        packaged = sets.add_parser(name, parents=[common], help=f"from {source}", epilog=example)
        packaged.set_defaults(name=name, source=source, caption=caption)
    network = f"FID's network, from the package {sources.PACKAGES['inception'].requirement}"
    sets.add_parser("inception", help=network, description=network, epilog="python prepare.py inception")
    on_disk = {}
    for name, (caption, what, example) in ON_DISK.items():
        example = f"python prepare.py {name} {example}"
        on_disk[name] = sets.add_parser(name, parents=[common], help=f"from a folder or .zip: {what}", epilog=example)
        on_disk[name].add_argument("path", type=Path, help=f"the folder or .zip: {what}")
        default = "that of the folder" if name == "folder" else name
        on_disk[name].add_argument("--name", help=f"name of the set (default: {default})")
        on_disk[name].set_defaults(caption=caption)
    on_disk["isic"].add_argument("--csv", type=Path, help="the ground truth (default: found in the folder or .zip)")
    caption = ON_DISK["folder"][0]
    on_disk["folder"].add_argument(
        "--caption", help=f"{{label}} stands for the class (default: {caption})", default=caption
    )
    on_disk["folder"].add_argument(
        "--group-pattern", metavar="REGEX", help="finds the patient in a file name (group 1 if any)"
    )
    return parser.parse_args()


def complete_options(options: argparse.Namespace) -> None:
    """Fill in what a set on disk leaves open. Raises UserError for an option that cannot work."""
    path = options.path.resolve()
    options.source = f"{path.name} with {options.csv.name}" if options.csv else path.name
    options.name = options.name or (path.stem if options.set == "folder" else options.set)
    if options.name.startswith(".") or Path(options.name).name != options.name:
        raise UserError(f"--name {options.name!r} is not the plain name of a folder; give one such as kvasir")
    if "{label}" not in options.caption:
        raise UserError(f"--caption {options.caption!r} has no {{label}}; write it where the class belongs")
    try:
        re.compile(options.group_pattern or "")
    except re.error as error:
        raise UserError(
            f"--group-pattern {options.group_pattern!r} is no regular expression ({error}); "
            r"give one such as 'person(\d+)'"
        ) from error


def pictures_of(options: argparse.Namespace) -> tuple[list[Path], list[Picture]]:
    """Where the pictures come from, and the pictures; their bytes are read later."""
    if options.set in PACKAGED:
        archives = [sources.fetch(package) for package in PACKAGES_OF.get(options.set, (options.set,))]
        return archives, PACKAGED[options.set][0](*archives)
    read = {
        "kvasir": labelled_sets.kvasir,
        "isic": partial(labelled_sets.isic, table=options.csv),
        "ham10000": labelled_sets.ham10000,
        "folder": partial(labelled_sets.class_folder, group_pattern=options.group_pattern),
    }
    return [options.path], read[options.set](options.path)


def main() -> None:
    options = parse_options()
    if options.set == "inception":
        print(f"FID's network: {sources.fetch_inception()}")
        return
    if options.path:
        complete_options(options)
    target = options.root / options.name
    request = {name: getattr(options, name) for name in ("source", "seed", "caption", "group_pattern")}
    if prepared.is_there(target, request):
        print(f"{target} is already prepared")
        return
    archives, pictures = pictures_of(options)
    one_file = len(archives) == 1 and archives[0].is_file()
    prepared.write(target, pictures, request, sources.sha256_of(archives[0]) if one_file else None)


if __name__ == "__main__":
    with exit_codes():
        sys.exit(main())
