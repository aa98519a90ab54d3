"""Any image file as 8-bit RGB: the one way in, for preparing, describing, training and evaluating alike."""

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from medart_core.errors import UserError

MAX_PIXELS = 150_000_000  # a larger image is taken for an accident or an attack; Pillow itself refuses 179 million

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # open_image has a limit of its own


def open_image(source: Path | BinaryIO | Image.Image, name: str | None = None, rough: int = 0) -> Image.Image:
    """Decode an image fully and make it 8-bit RGB, upright by its EXIF tag, its transparent parts on black.

    16-bit grey levels are scaled by the whole range of 16 bits, floating-point ones from [0, 1]. Of several frames it
    is the first. With `rough`, a JPEG may be decoded at a fraction of its size, yet no smaller than `rough` pixels
    each way: much faster, for a glance. Black is the empty background of radiographs and endoscopy.

    Raises:
        UserError: with `name` (default: the path), if it is no image, is cut short, or is larger than MAX_PIXELS.
    """
    shown = name or getattr(source, "filename", None) or source
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        if rough:
            image.draft("RGB", (rough, rough))
        if image.width * image.height <= MAX_PIXELS:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "no format that Pillow knows" if unknown else " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{shown} cannot be read as an image ({reason}); replace it or take it out of the data"
        ) from error
    raise UserError(f"{shown} has {image.width} x {image.height} pixels; shrink it to {MAX_PIXELS:,} pixels at most")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # Pillow's own conversion clips all above 255 to white
        top = 1.0 if image.mode == "F" else 65535.0
        values = np.asarray(image).astype(np.float64) / top
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(f"grey levels outside of 0 to {top:g}, save it with 8 or 16 bits")
        return Image.fromarray((values * 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
    return image.convert("RGB")
