"""An .npz of images as ADM's evaluator reads it (`arr_0`, uint8, NHWC), filled by rows, never held in memory.

An .npz is a zip archive, and an uncompressed one is its array with some bytes before and behind. So the file is laid
out beforehand, and any process writes any rows into it in any order. The archive's checksum is put together from those
of the rows, which also tell after an interruption what has really come to the disk.
"""

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from medart_core.checkpoint import TEMPORARY

MEMBER = b"arr_0.npy"
VERSION = 45  # of the zip format: with sizes of 64 bits
DATE = 0x21  # 1 January 1980: the same images make the same bytes
ELSEWHERE = 0xFFFFFFFF  # a size of 32 bits that says: see the one of 64
POLYNOMIAL = 0xEDB88320  # of the checksum, CRC-32
COPIED = 64  # rows at a time
THERE = 1 << 32  # marks a row's entry in the journal, above its checksum


def _local_header(crc: int, size: int) -> bytes:
    fields = (b"PK\3\4", VERSION, 0, 0, 0, DATE, crc, ELSEWHERE, ELSEWHERE, len(MEMBER), 20)
    return struct.pack("<4s5H3L2H", *fields) + MEMBER + struct.pack("<HHQQ", 1, 16, size, size)


def _directory(crc: int, size: int, offset: int) -> bytes:
    """What ends the archive: its one entry, and where that entry is, at `offset`."""
    fields = (b"PK\1\2", VERSION, VERSION, 0, 0, 0, DATE, crc, ELSEWHERE, ELSEWHERE, len(MEMBER), 20, 0, 0, 0, 0, 0)
    entry = struct.pack("<4s6H3L5H2L", *fields) + MEMBER + struct.pack("<HHQQ", 1, 16, size, size)
    end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, VERSION, VERSION, 0, 0, 1, 1, len(entry), offset)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, offset + len(entry), 1)
    return entry + end + locator + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(entry), ELSEWHERE, 0)


def _array_header(shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _image(matrix: list[int], bits: int) -> int:
    """A matrix over GF(2), given by its columns, applied to a vector of 32 bits."""
    image = 0
    while bits:
        image ^= matrix[(bits & -bits).bit_length() - 1]
        bits &= bits - 1
    return image


def _appending(length: int) -> list[int]:
    """What `length` bytes of zero behind some content do to its CRC-32, a linear map, as the columns of a matrix.

    So crc(a + b) is the image of crc(a), xor crc(b), as in zlib's crc32_combine.
    """
    power = [POLYNOMIAL, *(1 << bit for bit in range(31))]  # one bit of zero
    for _ in range(3):
        power = [_image(power, column) for column in power]  # one byte
    matrix = [1 << bit for bit in range(32)]
    while length:
        if length & 1:
            matrix = [_image(power, column) for column in matrix]
        power = [_image(power, column) for column in power]
        length >>= 1
    return matrix


class ImageNpz:
    """An archive in the making in a folder, with a journal of the rows that are on the disk.

    Args:
        shape: (N, H, W, 3) of the array to be.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int, int]):
        self.part, self.journal = folder / f"{TEMPORARY}images.npz", folder / f"{TEMPORARY}rows"
        self.shape, self.rows, self.row_bytes = shape, shape[0], shape[1] * shape[2] * shape[3]
        header = _array_header(shape)
        self.head = _local_header(0, 0)
        self.header, self.start = header, len(self.head) + len(header)
        self.size = len(header) + self.rows * self.row_bytes

    def begin(self) -> None:
        """Lay out the files, or take up those of an interrupted run; for one process, before any of them writes.

        That run may have been for another number of rows, for these do not move: numpy leaves room in its header.
        """
        there = self.part.is_file() and self.journal.is_file()
        if not there:
            self.journal.unlink(missing_ok=True)  # before the images that it speaks of
        with open(self.part, "r+b" if there else "wb") as file:
            file.write(self.head + self.header)
            file.truncate(self.start + self.rows * self.row_bytes)  # sparse: takes no space yet
        with open(self.journal, "ab") as file:
            file.truncate(8 * self.rows)
        if there:
            self._verify()

    def _verify(self) -> None:
        """Strike out what the journal says and the disk does not have, as after a power cut."""
        entries = self._entries()
        with open(self.part, "rb") as file:
            for row in np.flatnonzero(entries):
                file.seek(self.start + int(row) * self.row_bytes)
                if zlib.crc32(file.read(self.row_bytes)) + THERE != entries[row]:
                    entries[row] = 0
        self.journal.write_bytes(entries.tobytes())

    def _entries(self) -> np.ndarray:
        return np.fromfile(self.journal, np.uint64)

    def missing(self) -> list[int]:
        """The rows that are not there yet, in order."""
        return np.flatnonzero(self._entries() == 0).tolist()

    def take_over(self, archive: Path) -> None:
        """Copy the rows that a finished archive of such images has, and leave it as it is; for one process.

        Raises:
            zipfile.BadZipFile: if the checksum is not that of the content; no row of it is there then.
        """
        there = min(rows_of(archive), self.rows)
        if not any(row < there for row in self.missing()):
            return
        with zipfile.ZipFile(archive) as content, content.open(MEMBER.decode()) as array:
            array.read(len(self.header))
            try:
                for row in tqdm(range(0, there, COPIED), f"taking over {there} images", disable=there < 100 * COPIED):
                    pixels = array.read(min(COPIED, there - row) * self.row_bytes)
                    self.write(row, torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(-1, *self.shape[1:]))
                array.read(1)  # at the end the checksum is compared
            except zipfile.BadZipFile:
                with open(self.journal, "r+b") as file:
                    file.write(bytes(8 * there))
                raise

    def read(self, row: int) -> Tensor:
        """A row that is there, (H, W, 3) uint8."""
        return torch.from_numpy(
            np.fromfile(self.part, np.uint8, self.row_bytes, offset=self.start + row * self.row_bytes)
        ).view(self.shape[1:])

    def write(self, row: int, images: Tensor) -> None:
        """Write (n, H, W, 3) uint8 images as the rows from `row` on."""
        pixels = images.contiguous().numpy()
        with open(self.part, "r+b") as file:
            file.seek(self.start + row * self.row_bytes)
            file.write(pixels.data)
        entries = np.array([zlib.crc32(image.data) + THERE for image in pixels], np.uint64)
        with open(self.journal, "r+b") as file:
            file.seek(8 * row)
            file.write(entries.data)

    def publish(self, target: Path) -> None:
        """Turn what is there into the archive `target`; for one process, when no row is missing."""
        assert not self.missing()
        crc, appending = zlib.crc32(self.header), _appending(self.row_bytes)
        for entry in self._entries().tolist():
            crc = _image(appending, crc) ^ (entry - THERE)
        with open(self.part, "r+b") as file:
            file.write(_local_header(crc, self.size))
            file.seek(len(self.head) + self.size)
            file.write(_directory(crc, self.size, file.tell()))
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.part, target)
        self.journal.unlink()


def rows_of(archive: Path) -> int:
    """How many images a finished archive holds; 0 if there is none that can be read."""
    try:
        with zipfile.ZipFile(archive) as content, content.open(MEMBER.decode()) as array:
            np.lib.format.read_magic(array)
            return np.lib.format.read_array_header_1_0(array)[0][0]
    except (OSError, zipfile.BadZipFile, KeyError, ValueError):
        return 0
