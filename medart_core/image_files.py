"""The files of a folder or zip, read one at a time and only when they are needed; DICOM files among them as PNG."""

import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from medart_core import dicom
from medart_core.errors import UserError
from medart_core.prepared import IMAGE_SUFFIXES

Files = Mapping[PurePosixPath, Callable[[], IO[bytes]]]  # how each file is opened, by its path in the source, sorted


def files_of(path: Path) -> Files:
    """All files of a folder or zip that are not hidden; nothing that leads out of it."""
    found = _walk(path) if path.is_dir() else _unzip(path)
    return {name: found[name] for name in sorted(found, key=str) if not _is_hidden(name)}


def images_of(files: Files) -> dict[PurePosixPath, Callable[[], bytes]]:
    """The images among the files, each with the function that reads it; the name of a DICOM file ends in .png.

    Raises:
        UserError: if two files would get the same name.
    """
    images, source = {}, {}
    for name, opener in files.items():
        target, read = name, partial(read_file, name, opener)
        if _is_dicom(name, opener):
            stem = name.stem if name.suffix.lower() == ".dcm" else name.name
            target, read = name.with_name(f"{stem}.png"), partial(_read_dicom, name, opener)
        elif name.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        if target in images:
            raise UserError(f"{source[target]} and {name} would both be {target}; rename one of them")
        images[target], source[target] = read, name
    return images


def read_file(name: PurePosixPath, opener: Callable[[], IO[bytes]], size: int = -1) -> bytes:
    """The content of a file, or its first `size` bytes."""
    try:
        with opener() as file:
            return file.read(size)
    except (OSError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{name} cannot be read ({error}); replace it, or the archive") from error


def _read_dicom(name: PurePosixPath, opener: Callable[[], IO[bytes]]) -> bytes:
    return dicom.as_png(read_file(name, opener), str(name))


def _is_dicom(name: PurePosixPath, opener: Callable[[], IO[bytes]]) -> bool:
    """By the suffix, or by the content of a file without one (scanners end names with a number: 1.2.840.10008)."""
    if name.suffix and not name.suffix[1:].isdigit():
        return name.suffix.lower() == ".dcm"
    end = dicom.MAGIC_AT + len(dicom.MAGIC)
    return read_file(name, opener, end)[dicom.MAGIC_AT :] == dicom.MAGIC


def _is_hidden(name: PurePosixPath) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.parts)


def _walk(root: Path) -> dict[PurePosixPath, Callable[[], IO[bytes]]]:
    files = {}
    for folder, folders, names in os.walk(root):
        for path in (Path(folder, name) for name in folders + names):
            if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
                raise UserError(f"{path} is a link out of {root}; copy what it points to into the folder")
            if path.is_file():
                files[PurePosixPath(path.relative_to(root).as_posix())] = partial(path.open, "rb")
    return files


def _unzip(path: Path) -> dict[PurePosixPath, Callable[[], IO[bytes]]]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a folder or a .zip")
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is damaged or no zip ({error}); download it again") from error
    files = {}
    for member in archive.infolist():
        name = PurePosixPath(member.filename)
        if name.is_absolute() or ".." in name.parts or stat.S_ISLNK(member.external_attr >> 16):
            raise UserError(f"{path}: {member.filename} leads out of the archive; unpack it and give the folder")
        if not member.is_dir():
            files[name] = partial(archive.open, member)
    return files
