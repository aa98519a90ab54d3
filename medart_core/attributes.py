"""What can be measured on the pixels of an image, as named categories: the truth that captions are held against.

Every function takes an 8-bit RGB image of any size and reads nothing else: neither its file name nor its class. A
threshold stands where it cuts the train split of the prepared set into parts of about equal size, unless noted.
Left and right are those of the picture.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

from medart_core.packaged_sets import dominant_colour

# Chest X-rays. Grey levels lie in [0, 1].
DARK_BELOW, BRIGHT_FROM = 0.456, 0.51  # mean grey level
LOW_CONTRAST_BELOW, HIGH_CONTRAST_FROM = 0.214, 0.243  # standard deviation of the grey levels
CLEAR_BELOW, HAZY_FROM = 0.656, 0.728  # grey level of the lung fields over that of the mediastinum
SIDE_FROM = 0.06  # between the lung fields; the heart makes the right one brighter in half of the images
MARKER_FROM = 0.4  # grey level over the surroundings; nearly every image has a marker, half of them so plain a one
LUNG_ROWS, LEFT_LUNG, RIGHT_LUNG, MEDIASTINUM = (0.25, 0.65), (0.18, 0.42), (0.58, 0.82), (0.45, 0.55)
MARKER_ROWS, MARKER_COLUMNS = (0.0, 0.71), ((0.0, 0.18), (0.82, 1.0))  # where letters are put
MARKER_PIXELS, MARKER_SURROUNDINGS = 6, 15  # of a picture of 112 px: pixels that are averaged, side of the square

# Dermoscopy. Colours lie in [0, 1] per channel.
EVEN_BELOW, MOTTLED_FROM = 0.063, 0.091  # root mean square distance from the mean colour
SOFT_BELOW, SHARP_FROM = 0.047, 0.076  # largest steps of the grey level between areas of an eighth of the side

# Histology.
OPEN_FROM = 0.78  # all channels: glass
BROWN_FROM = -0.06  # mean green minus blue of the tissue; eosin and haematoxylin lie below -0.1, DAB above -0.03
FEW_BELOW, MANY_FROM = 0.04, 0.12  # share of the pixels that are dark blue to violet
CLOSED_BELOW, MOSTLY_OPEN_FROM = 0.125, 0.4  # share of the pixels that are glass

# Photographs: round numbers.
PHOTO_DARK_BELOW, PHOTO_BRIGHT_FROM = 0.4, 0.52  # mean grey level
WARM_FROM, COOL_BELOW = 0.05, -0.02  # mean red minus blue

Measured = dict[str, str]


def shrink(image: Image.Image, side: int) -> np.ndarray:
    """The image as (side, side, 3) float64 in [0, 1], its shape not kept, averaged over areas where it is larger."""
    larger = min(image.size) >= side
    square = image.convert("RGB").resize((side, side), Image.Resampling.BOX if larger else Image.Resampling.BILINEAR)
    return np.asarray(square, dtype=np.float64) / 255


def region(grey: np.ndarray, rows: tuple[float, float], columns: tuple[float, float]) -> np.ndarray:
    """The part of (H, W) between fractions of its height and width."""
    (top, bottom), (left, right) = rows, columns
    height, width = grey.shape
    return grey[int(top * height) : int(bottom * height), int(left * width) : int(right * width)]


def category(value: float, low: float, high: float, names: tuple[str, str, str]) -> str:
    """The first name below `low`, the last from `high`, the middle one between."""
    return names[0] if value < low else names[2] if value >= high else names[1]


# --- Chest X-rays ---

EXPOSURES, CONTRASTS = ("dark", "balanced", "bright"), ("low", "moderate", "high")
SIDES, HAZES, MARKERS = ("left brighter", "even", "right brighter"), ("clear", "slight", "hazy"), ("faint", "plain")


def marker_strength(grey: np.ndarray) -> float:
    """How far the brightest pixels at the sides stand out of their surroundings, for (112, 112) grey levels."""
    half = MARKER_SURROUNDINGS // 2
    padded = np.pad(grey, half, mode="edge")
    sums = np.pad(padded.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    size = MARKER_SURROUNDINGS
    means = (sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]) / size**2
    beside = [region(grey - means, MARKER_ROWS, columns).ravel() for columns in MARKER_COLUMNS]
    return float(np.sort(np.concatenate(beside))[-MARKER_PIXELS:].mean())


def chest_xray(image: Image.Image) -> Measured:
    """exposure, contrast, side (which lung field is brighter), haze (of the lung fields), marker (a bright letter).

    The lung fields are two fixed boxes, which fit a frontal view that fills the picture.
    """
    grey = shrink(image, 112).mean(axis=2)
    left, right, middle = (
        float(region(grey, LUNG_ROWS, columns).mean()) for columns in (LEFT_LUNG, RIGHT_LUNG, MEDIASTINUM)
    )
    return {
        "exposure": category(float(grey.mean()), DARK_BELOW, BRIGHT_FROM, EXPOSURES),
        "contrast": category(float(grey.std()), LOW_CONTRAST_BELOW, HIGH_CONTRAST_FROM, CONTRASTS),
        "haze": category((left + right) / 2 / max(middle, 1e-6), CLEAR_BELOW, HAZY_FROM, HAZES),
        "side": category(right - left, -SIDE_FROM, SIDE_FROM, SIDES),
        "marker": MARKERS[marker_strength(grey) >= MARKER_FROM],
    }


# --- Dermoscopy ---

COLOURS = ("black", "blue-grey", "red-pink", "dark brown", "light brown", "pale tan")
VARIEGATIONS, BORDERS = ("even", "varied", "mottled"), ("soft", "moderate", "sharp")


def dermoscopy(image: Image.Image) -> Measured:
    """colour (the dominant one), variegation (how far colours spread), border (how sharp the strongest edges are)."""
    colours = shrink(image, 32)
    spread = float(np.sqrt(((colours - colours.mean(axis=(0, 1))) ** 2).sum(axis=2).mean()))
    areas = colours.mean(axis=2).reshape(8, 4, 8, 4).mean(axis=(1, 3))
    steps = np.concatenate([np.abs(np.diff(areas, axis=axis)).ravel() for axis in (0, 1)])
    return {
        "colour": dominant_colour(image.convert("RGB")),
        "variegation": category(spread, EVEN_BELOW, MOTTLED_FROM, VARIEGATIONS),
        "border": category(float(np.sort(steps)[-8:].mean()), SOFT_BELOW, SHARP_FROM, BORDERS),
    }


# --- Histology ---

STAINS, NUCLEI, SPACES = ("H&E", "IHC"), ("few", "some", "many"), ("closed", "partly open", "mostly open")


def histology(image: Image.Image) -> Measured:
    """stain (pink and violet, or brown and blue), nuclei (the dark blue to violet area), space (the bare glass)."""
    red, green, blue = shrink(image, 64).transpose(2, 0, 1)
    glass = np.minimum(np.minimum(red, green), blue) >= OPEN_FROM
    tint = float((green - blue)[~glass].mean()) if not glass.all() else -1.0
    stain = STAINS[tint >= BROWN_FROM]
    if stain == "IHC":  # the counterstain is pale
        nuclei = (blue - red > 0.06) & (red < 0.7)
    else:
        nuclei = (red < 0.4) & (blue > red - 0.02) & (green < blue - 0.02) & (green < red + 0.03)
    return {
        "stain": stain,
        "nuclei": category(float(nuclei.mean()), FEW_BELOW, MANY_FROM, NUCLEI),
        "space": category(float(glass.mean()), CLOSED_BELOW, MOSTLY_OPEN_FROM, SPACES),
    }


# --- Photographs ---

TONES = ("cool", "neutral", "warm")


def photograph(image: Image.Image) -> Measured:
    """exposure (how bright it is) and tone (blue to red)."""
    colours = shrink(image, 32)
    red, _, blue = colours.mean(axis=(0, 1))
    return {
        "exposure": category(float(colours.mean()), PHOTO_DARK_BELOW, PHOTO_BRIGHT_FROM, EXPOSURES),
        "tone": category(float(red - blue), COOL_BELOW, WARM_FROM, TONES),
    }


MEASURES: dict[str, Callable[[Image.Image], Measured]] = {
    "chest-xray": chest_xray,
    "dermoscopy": dermoscopy,
    "histology": histology,
    "photograph": photograph,
}
VALUES: dict[str, dict[str, tuple[str, ...]]] = {
    "chest-xray": {
        "exposure": EXPOSURES, "contrast": CONTRASTS, "haze": HAZES, "side": SIDES, "marker": MARKERS
    },
    "dermoscopy": {"colour": COLOURS, "variegation": VARIEGATIONS, "border": BORDERS},
    "histology": {"stain": STAINS, "nuclei": NUCLEI, "space": SPACES},
    "photograph": {"exposure": EXPOSURES, "tone": TONES},
}  # fmt: skip


def measure(domain: str, image: Image.Image) -> Measured:
    """The attributes of an image of that domain: each name of VALUES[domain] with one of its values."""
    return MEASURES[domain](image)
