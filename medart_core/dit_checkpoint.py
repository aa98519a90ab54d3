"""Weights of DiT: the published files, fetched and watched over, and the .pt files of training."""

import hashlib
import json
import os
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffusers_grad.attention import attend
from medart_core.checkpoint import TEMPORARY, write_json
from medart_core.errors import UserError

URL = "https://dl.fbaipublicfiles.com/DiT/models/"
FOLDER = Path(__file__).resolve().parents[1] / "pretrained_models"
HASHES = "sha256.json"
PUBLISHED, PUBLISHED_SIZES = "DiT-XL/2", (256, 512)
VAE_SCALE_FACTOR = 8  # pixels per latent along a side
CHUNK = 2**20


@dataclass
class Weights:
    """The tensors of a DiT by name, what the training that made them says of itself, and where they come from."""

    state: dict[str, Tensor]
    source: str
    args: dict[str, Any] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """Classes without the null class, for which there is a row in the table, too."""
        return self.args.get("num_classes") or len(self.state["y_embedder.embedding_table.weight"]) - 1

    def vae(self, asked: str | None, default: str) -> str:
        """The VAE to decode with: what is asked for, or what the features came from.

        The published pair, whose latents are the same, has `default` for its decoder.
        """
        trained = self.args.get("vae", default)
        return asked or (default if trained in ("ema", "mse") else trained)


def fetch(image_size: int, folder: Path = FOLDER, url: str = URL) -> Path:
    """The published DiT-XL/2 of that size, downloaded if it is not there.

    No list of its hashes is published: the first download's is recorded, and later files are held against it.

    Raises:
        UserError: if it cannot be fetched, or has another hash than the first time.
    """
    if image_size not in PUBLISHED_SIZES:
        raise UserError(f"{PUBLISHED} is published for 256 and 512 pixels, not {image_size}; give --ckpt for yours")
    file = folder / f"DiT-XL-2-{image_size}x{image_size}.pt"
    if not file.is_file():
        _download(f"{url}{file.name}", file)
    with open(file, "rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    record = folder / HASHES
    known = json.loads(record.read_text()) if record.is_file() else {}
    if file.name not in known:
        write_json(record, known | {file.name: found})
    elif known[file.name] != found:
        raise UserError(
            f"{file} is not the file that was first there (sha256 {found[:12]}... instead of "
            f"{known[file.name][:12]}...); remove it to fetch it again, or its entry in {record} if it is right"
        )
    return file


def _download(url: str, file: Path) -> None:
    print(f"fetching {url} (licence of the weights: CC-BY-NC 4.0, not for commercial use)", flush=True)
    part = file.with_name(f"{TEMPORARY}{file.name}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=60) as answer, open(part, "wb") as target:
            length = int(answer.headers.get("Content-Length") or 0)
            with tqdm(total=length or None, desc=file.name, unit="B", unit_scale=True) as progress:
                while chunk := answer.read(CHUNK):
                    progress.update(target.write(chunk))
            if length and target.tell() != length:
                raise OSError(f"the connection ended after {target.tell()} of {length} bytes")
            target.flush()
            os.fsync(target.fileno())
        os.replace(part, file)
    except (OSError, ValueError, HTTPException) as error:  # urllib's own errors are OSErrors
        raise UserError(f"cannot fetch {url} ({error}); download it elsewhere and put it at {file}") from error
    finally:
        part.unlink(missing_ok=True)


def read(file: Path) -> Weights:
    """Weights from a .pt file: a training checkpoint's average (`ema`) before its `model`, or a plain state dict.

    Raises:
        UserError: if there is no such file, it is damaged, or it holds something else.
    """
    if not file.is_file():
        raise UserError(f"{file} does not exist; give the .pt file of a DiT")
    try:
        # Older checkpoints hold their options as an argparse.Namespace; a plain one takes its place.
        with torch.serialization.safe_globals([(SimpleNamespace, "argparse.Namespace")]):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # of a damaged file torch and pickle raise nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0]
        raise UserError(f"{file} cannot be read as weights ({reason}); copy or download it again") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{file} holds no weights but a {type(content).__name__}; give the .pt file of a DiT")
    state = content.get("ema") or content.get("model") or content
    args = content.get("args")
    args = vars(args) if isinstance(args, SimpleNamespace) else args if isinstance(args, Mapping) else {}
    if not isinstance(state, Mapping) or "y_embedder.embedding_table.weight" not in state:
        raise UserError(f"{file} holds no weights of a DiT; give a checkpoint of train.py, or a DiT's state dict")
    return Weights(dict(state), str(file), dict(args))


def open_model(
    factories: Mapping[str, Callable[..., Any]],
    ckpt: Path | None,
    name: str | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
) -> tuple[Any, Weights]:
    """A DiT in evaluation mode on the CPU, and its weights: of `ckpt`, else the published ones, fetched if need be.

    What is not given is as the checkpoint says of itself, else as published: DiT-XL/2, 256 pixels, 1000 classes.

    Args:
        factories: the models by name, `models.DiT_models`.
    """
    if ckpt is None and name not in (None, PUBLISHED):
        raise UserError(f"no weights of {name} are published, only {PUBLISHED}'s; give yours as --ckpt")
    weights = read(ckpt or fetch(image_size or PUBLISHED_SIZES[0]))
    args = {"model": PUBLISHED, "image_size": PUBLISHED_SIZES[0]} | weights.args
    model = load(
        factories, weights, name or args["model"], image_size or args["image_size"], num_classes or weights.num_classes
    )
    return model, weights


def load(
    factories: Mapping[str, Callable[..., Any]], weights: Weights, name: str, image_size: int, num_classes: int
) -> Any:
    """A DiT with these weights, frozen and in evaluation mode, on the CPU.

    Raises:
        UserError: if they belong to another model, another number of classes or another size.
    """
    if name not in factories:
        raise UserError(f"there is no model {name!r}; choose from {', '.join(factories)}")
    if image_size % VAE_SCALE_FACTOR:
        raise UserError(f"--image-size {image_size} does not fit the VAE; give a multiple of {VAE_SCALE_FACTOR}")
    input_size = image_size // VAE_SCALE_FACTOR
    qk_norm = "blocks.0.attn.q_norm.weight" in weights.state
    with torch.device("meta"):
        model = factories[name](input_size=input_size, num_classes=num_classes, qk_norm=qk_norm)
    _check(model, weights, name, image_size, num_classes)
    # Assigned, not copied: of a file with optimiser and all only the average is ever read.
    model.load_state_dict({key: tensor.float() for key, tensor in weights.state.items()}, assign=True)
    model.set_attention(attend)
    return model.requires_grad_(False).eval()


def _check(model: Any, weights: Weights, name: str, image_size: int, num_classes: int) -> None:
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in weights.state.items()}
    different = [key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)]
    if not different:
        return
    table, positions = "y_embedder.embedding_table.weight", "pos_embed"
    if different == [table] and table in found and found[table][1:] == wanted[table][1:]:
        raise UserError(
            f"{weights.source} knows {found[table][0] - 1} classes, not {num_classes}; "
            f"give --num-classes {found[table][0] - 1}"
        )
    if different == [positions] and positions in found and found[positions][2:] == wanted[positions][2:]:
        side = round(found[positions][1] ** 0.5) * model.patch_size * VAE_SCALE_FACTOR
        raise UserError(f"{weights.source} was trained at {side} pixels, not {image_size}; give --image-size {side}")
    key = min(different)
    shapes = [f"has the shape {shapes[key]}" if key in shapes else "is missing" for shapes in (found, wanted)]
    raise UserError(
        f"{weights.source} is no {name}: its {key} {shapes[0]}, there it {shapes[1]}; give its own --model"
    )
