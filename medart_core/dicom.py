"""Images of DICOM files as PNG, without the patient's data. pydicom is asked for only when there is such a file."""

import io

import numpy as np
from PIL import Image

from medart_core.errors import UserError

MAGIC, MAGIC_AT = b"DICM", 128


def as_png(content: bytes, name: str) -> bytes:
    """The first frame of a DICOM file as an 8-bit RGB PNG.

    Grey levels are rescaled (slope and intercept, or the modality's table), then the first window, or their whole
    range where none is given, becomes 0 to 255; MONOCHROME1 is inverted. The window is taken as linear.
    Source: DICOM PS3.3, C.7.6.3.1.2, C.11.1 and C.11.2.1.2.

    Raises:
        UserError: if pydicom is not installed, or if the file cannot be decoded.
    """
    try:
        import pydicom
        import pydicom.pixels
    except ImportError as error:
        raise UserError(f"{name} is a DICOM file; to read it, run: pip install pydicom") from error
    try:
        file = pydicom.dcmread(io.BytesIO(content))
        pixels = pydicom.pixels.pixel_array(file, index=0)
        if file.PhotometricInterpretation.startswith("MONOCHROME"):
            pixels = _windowed(pydicom.pixels.apply_modality_lut(pixels, file), file)
        elif pixels.dtype != np.uint8 or pixels.ndim != 3:
            raise ValueError(f"{file.PhotometricInterpretation} with {file.BitsAllocated} bits is not supported")
    except Exception as error:  # pydicom and the decoders that it calls raise nearly anything on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} cannot be read as a DICOM image ({reason}); replace it or take it out") from error
    png = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(png, "PNG")
    return png.getvalue()


def _windowed(values: np.ndarray, file) -> np.ndarray:
    """8-bit grey levels of rescaled values [h, w]; `file` is a pydicom Dataset."""
    centre, width = _first(file.get("WindowCenter")), _first(file.get("WindowWidth"))
    if centre is None or width is None:
        low, high = float(values.min()), float(values.max())
    else:
        low, high = centre - width / 2, centre + width / 2 - 1
    grey = np.clip((values - low) / max(high - low, 1e-9), 0, 1) * 255
    if file.PhotometricInterpretation == "MONOCHROME1":
        grey = 255 - grey
    return grey.round().astype(np.uint8)


def _first(value) -> float | None:
    """The first of several values of a DICOM element, or its one value."""
    several = value if hasattr(value, "__getitem__") and not isinstance(value, str) else [value]
    return float(several[0]) if several and several[0] is not None else None
