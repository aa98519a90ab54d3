"""Arrays inside .npz files as memory maps, so that 50,000 images need no memory of their own."""

import math
import shutil
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from medart_core.errors import UserError

LOCAL_HEADER, NAME_LENGTHS = 30, 26  # bytes of a zip member's own header, and where in it two lengths stand


def keys(path: Path) -> list[str]:
    """Names of the arrays in a .npz file.

    Raises:
        UserError: if it is no zip, or a stored checksum does not hold.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a .npz file")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            names = [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} cannot be read as .npz ({error}); write it again") from error
    if damaged:
        raise UserError(f"{path} is damaged: the checksum of {damaged} is wrong; write it again")
    return names


def read(path: Path, key: str) -> np.ndarray:
    """An array of a .npz file as a read-only map of that file; a compressed one is unpacked to a temporary file first.

    Raises:
        UserError: if it holds Python objects, or not as many bytes as it says.
    """
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{key}.npy")
        if member.compress_type == zipfile.ZIP_STORED:
            with open(path, "rb") as file:
                file.seek(member.header_offset + NAME_LENGTHS)
                start = member.header_offset + LOCAL_HEADER + sum(struct.unpack("<HH", file.read(4)))
                return _map(file, start, member.file_size, f"{path}: {key}")
        with tempfile.TemporaryFile() as file, archive.open(member) as packed:
            shutil.copyfileobj(packed, file, 2**20)
            return _map(file, 0, member.file_size, f"{path}: {key}")


def images(path: Path) -> np.ndarray:
    """The images of a sample file, uint8 (N, H, W, 3), under the key arr_0 (ADM's layout)."""
    names = keys(path)
    if "arr_0" not in names:
        raise UserError(f"{path} has no arr_0 (it has: {', '.join(names)}); give a file as sample_ddp.py writes it")
    array = read(path, "arr_0")
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or not array.size:
        raise UserError(f"{path}: arr_0 is {array.dtype} {array.shape}; it must be uint8 (N, height, width, 3)")
    return array


def _map(file: IO[bytes], start: int, size: int, name: str) -> np.ndarray:
    file.seek(start)
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
    except ValueError as error:
        raise UserError(f"{name} is no array ({error}); write the file again") from error
    if dtype.hasobject:
        raise UserError(f"{name} holds Python objects, which are never loaded; save plain numbers")
    if file.tell() - start + math.prod(shape) * dtype.itemsize != size:
        raise UserError(f"{name} is cut short; write the file again")
    if not math.prod(shape):
        return np.empty(shape, dtype)
    return np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran else "C")
