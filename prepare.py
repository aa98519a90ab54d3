"""Make dataset/<name>/{train,val,test} with images, raw.csv and metadata.csv from a known source of labelled images.

    python prepare.py chest-xray
    python prepare.py dermoscopy-patches
    python prepare.py folder kvasir-dataset-v2.zip --name kvasir --caption "An endoscopic image of {label}"

A group (a patient, or what --group-pattern finds in a file name) never crosses a split. A second run does nothing.
"""

import argparse
import io
import os
import re
import stat
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from medart_core import prepared, sources
from medart_core.errors import UserError, exit_codes
from medart_core.images import open_image
from medart_core.prepared import Picture

ROOT = Path(__file__).resolve().parent

XRAY_CAPTION = "A chest X-ray image of {label}"
XRAY_LABELS = {"bacteria": "bacterial pneumonia", "virus": "viral pneumonia", None: "normal lungs"}
XRAY_NAME = re.compile(r"person(?P<person>\d+)_(?P<germ>bacteria|virus)_|(?:NORMAL2-)?IM-(?P<normal>\d+)-")

PATCH_CAPTION = "A dermoscopic image patch, {label}"
PATCH_SIDE = 32  # five patches of the package are cut off at the picture's edge and left out
# Thresholds on the mean CIELAB colour of a patch, set by looking at all of them: each colour has at least 120 patches.
BLACK_BELOW_L, DARK_BELOW_L, LIGHT_BELOW_L = 28, 48, 66
GREY_BELOW_L, GREY_BELOW_CHROMA, BLUE_BELOW_HUE = 60, 14, 10
PINK_FROM_L, PINK_FROM_CHROMA, PINK_BELOW_HUE = 38, 10, 42  # hue in degrees


# --- Chest X-rays ---


def xray_patient(name: str) -> str:
    """The patient of a file: person numbers hold across bacteria and virus, IM numbers across both series of names."""
    found = XRAY_NAME.match(name)
    if found is None:
        raise UserError(f"{name} names no patient; the package is not the one that prepare.py knows")
    return f"person{int(found['person'])}" if found["person"] else f"IM-{found['normal']}"


def xray_label(name: str) -> str:
    found = XRAY_NAME.match(name)
    return XRAY_LABELS[found["germ"] if found else None]


def chest_xrays(archive: Path) -> list[Picture]:
    """Paediatric chest X-rays of the Guangzhou collection (CC0); the package's own split mixes patients."""
    pattern = re.compile(r"sofiimg/datasets/pneumonia/.*\.jpeg")
    members = sources.read_members(archive, lambda name: bool(pattern.fullmatch(name)))
    names = [(PurePosixPath(path).name, content) for path, content in members.items()]
    return [Picture(name, xray_label(name), xray_patient(name), partial(bytes, content)) for name, content in names]


# --- Dermoscopy patches ---


def mean_lab(image: Image.Image) -> tuple[float, float, float]:
    """CIELAB lightness [0, 100], a and b (D65) of an sRGB image's mean colour (IEC 61966-2-1, CIE 15)."""
    mean = np.asarray(image, dtype=np.float64).reshape(-1, 3).mean(axis=0) / 255
    linear = np.where(mean <= 0.04045, mean / 12.92, ((mean + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = (to_xyz @ linear) / np.array([0.9505, 1.0, 1.089])
    fx, fy, fz = (v ** (1 / 3) if v > (6 / 29) ** 3 else v / (3 * (6 / 29) ** 2) + 4 / 29 for v in (x, y, z))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


def dominant_colour(image: Image.Image) -> str:
    """Name the colour of a patch: black, then blue-grey, then red-pink, and the browns by lightness."""
    lightness, a, b = mean_lab(image)
    chroma, hue = np.hypot(a, b), np.degrees(np.arctan2(b, a))
    if lightness < BLACK_BELOW_L:
        return "black"
    if lightness < GREY_BELOW_L and (chroma < GREY_BELOW_CHROMA or hue < BLUE_BELOW_HUE):
        return "blue-grey"
    if lightness >= PINK_FROM_L and chroma >= PINK_FROM_CHROMA and hue < PINK_BELOW_HUE:
        return "red-pink"
    return "dark brown" if lightness < DARK_BELOW_L else "light brown" if lightness < LIGHT_BELOW_L else "pale tan"


def dermoscopy_patches(archive: Path) -> list[Picture]:
    """Patches of PH2 lesions as PNG. Pairs stay together, and so do pairs that have a patch in common."""
    members = sources.read_members(archive, lambda name: name.endswith(".bmp"))
    same_bytes: dict[bytes, str] = {}
    leader: dict[str, str] = {}

    def find(pair: str) -> str:
        while leader.setdefault(pair, pair) != pair:
            pair = leader[pair]
        return pair

    pictures = []
    for path, content in members.items():
        name = PurePosixPath(path)
        pair = name.stem[:-1]  # patch123a and patch123b
        leader[find(pair)] = find(same_bytes.setdefault(content, pair))
        image = open_image(io.BytesIO(content), name.name)
        if image.size == (PATCH_SIDE, PATCH_SIDE):
            png = io.BytesIO()
            image.save(png, "PNG")
            pictures.append(Picture(f"{name.stem}.png", dominant_colour(image), pair, partial(bytes, png.getvalue())))
    print(
        "the patches name no lesion: pairs stay together, but a lesion may cross the split; claim no held-out patients"
    )
    return [picture._replace(group=find(picture.group)) for picture in pictures]


# --- Any tree with a folder per class ---


def class_folder(path: Path, group_pattern: str | None) -> list[Picture]:
    """Images of a folder or zip with one folder per class (below any folder that holds all of them)."""
    found = _walk(path) if path.is_dir() else _unzip(path)
    files = {PurePosixPath(name): read for name, read in sorted(found.items())}
    wrapped = all(len(name.parts) > 2 for name in files)
    while files and wrapped and len({name.parts[0] for name in files}) == 1:
        files = {PurePosixPath(*name.parts[1:]): read for name, read in files.items()}
        wrapped = all(len(name.parts) > 2 for name in files)
    flat = next((name for name in files if len(name.parts) == 1), None)
    if flat or not files:
        what = f"{flat} lies in no class folder" if flat else "no images"
        raise UserError(f"{path}: {what}; give a folder or zip with one folder per class, such as normal/1.png")
    if {name.parts[0] for name in files} <= {"train", "val", "valid", "validation", "test"}:
        raise UserError(f"{path} is split already; give one of its parts, or put the images into one folder per class")
    if group_pattern is None:
        print("no --group-pattern: every file counts as a patient of its own")
    label = {name: re.sub("[-_]", " ", name.parts[0]).strip() for name in files}
    return [Picture(str(name), label[name], _group(name, group_pattern), read) for name, read in files.items()]


def _group(name: PurePosixPath, pattern: str | None) -> str:
    if pattern is None:
        return str(name)
    found = re.search(pattern, name.name)
    group = found and found[min(1, found.re.groups)]
    if not group:
        raise UserError(f"--group-pattern {pattern} finds nothing in {name}; widen it, every file needs a group")
    return group


def _is_image(name: PurePosixPath | Path) -> bool:
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.parts)
    return not hidden and name.suffix.lower() in prepared.IMAGE_SUFFIXES


def _walk(root: Path) -> dict[str, Callable[[], bytes]]:
    files = {}
    for folder, folders, names in os.walk(root):
        for path in (Path(folder, name) for name in folders + names):
            if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
                raise UserError(f"{path} is a link out of {root}; copy what it points to into the folder")
            if path.is_file() and _is_image(relative := path.relative_to(root)):
                files[relative.as_posix()] = path.read_bytes
    return files


def _unzip(path: Path) -> dict[str, Callable[[], bytes]]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a folder or a .zip with one folder per class")
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is damaged or no zip ({error}); download it again") from error
    files = {}
    for member in archive.infolist():
        name = PurePosixPath(member.filename)
        if name.is_absolute() or ".." in name.parts or stat.S_ISLNK(member.external_attr >> 16):
            raise UserError(f"{path}: {member.filename} leads out of the archive; unpack it and give the folder")
        if not member.is_dir() and _is_image(name):
            files[str(name)] = partial(archive.read, member)
    return files


# --- The command ---

PACKAGED = {"chest-xray": (chest_xrays, XRAY_CAPTION), "dermoscopy-patches": (dermoscopy_patches, PATCH_CAPTION)}


def parse_options() -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--root", type=Path, default=ROOT / "dataset", help="where the set's folder is made")
    common.add_argument("--seed", type=int, default=0, help="of the split")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sets = parser.add_subparsers(dest="set", required=True, metavar="chest-xray | dermoscopy-patches | folder")
    for name, (_, caption) in PACKAGED.items():
        source = sources.PACKAGES[name].requirement
        packaged = sets.add_parser(name, parents=[common], help=f"from the package {source}")
        packaged.set_defaults(name=name, source=source, caption=caption, group_pattern=None)
    folder = sets.add_parser("folder", parents=[common], help="from a folder or .zip with one folder per class")
    folder.add_argument("path", type=Path, help="the folder or .zip")
    folder.add_argument("--name", help="name of the set (default: that of the folder)")
    folder.add_argument("--caption", default="A medical image of {label}", help="{label} stands for the class")
    folder.add_argument("--group-pattern", metavar="REGEX", help="finds the patient in a file name (group 1 if any)")
    return parser.parse_args()


def complete_folder_options(options: argparse.Namespace) -> None:
    """Fill in what `folder` leaves open. Raises UserError for an option that cannot work."""
    options.source = options.path.resolve().name
    options.name = options.name or options.path.resolve().stem
    if options.name.startswith(".") or Path(options.name).name != options.name:
        raise UserError(f"--name {options.name!r} is not the plain name of a folder; give one such as kvasir")
    if "{label}" not in options.caption:
        raise UserError(f"--caption {options.caption!r} has no {{label}}; write it where the class belongs")
    try:
        re.compile(options.group_pattern or "")
    except re.error as error:
        raise UserError(f"--group-pattern {options.group_pattern!r} is no regular expression ({error})") from error


def main() -> None:
    options = parse_options()
    if options.set == "folder":
        complete_folder_options(options)
    target = options.root / options.name
    request = {name: getattr(options, name) for name in ("source", "seed", "caption", "group_pattern")}
    if prepared.is_there(target, request):
        print(f"{target} is already prepared")
        return
    if options.set == "folder":
        archive, pictures = options.path, class_folder(options.path, options.group_pattern)
    else:
        archive = sources.fetch(options.set)
        pictures = PACKAGED[options.set][0](archive)
    prepared.write(target, pictures, request, sources.sha256_of(archive) if archive.is_file() else None)


if __name__ == "__main__":
    with exit_codes():
        sys.exit(main())
