"""A small ResNet with random weights, how images reach it, and the file that keeps a trained one."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification

from medart_core.checkpoint import write_json
from medart_core.errors import UserError

SIDE = 64  # pixels; one core trains about 900 images of this size per second
BATCH = 64
# Few features on purpose: a Frechet distance needs several times as many images as there are features.
HIDDEN = (32, 64, 96, 128)
MAX_ZOOM, MAX_DEGREES, MAX_SHIFT, MAX_CONTRAST, MAX_BRIGHTNESS = 0.1, 6, 0.08, 0.1, 0.05


def shrink(images: Tensor | np.ndarray | Iterable[Any], side: int = SIDE) -> Tensor:
    """Images, or batches of them, (N, 3, H, W) uint8 of any size, as (N, 3, side, side) uint8.

    The resize is bicubic with antialiasing, without regard to the shape; values are rounded and clipped.
    """
    batches = (images,) if isinstance(images, Tensor | np.ndarray) else images
    return torch.cat([_resize(chunk, side) for batch in batches for chunk in torch.as_tensor(batch).split(BATCH)])


def _resize(images: Tensor, side: int) -> Tensor:
    if images.dtype != torch.uint8:
        raise TypeError(f"images are {images.dtype}, not uint8")
    if images.shape[2:] == (side, side):
        return images
    resized = F.interpolate(images.float(), (side, side), mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).byte()


def network_input(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 (B, 3, H, W) as float32 in [-1, 1] in the memory layout that convolutions like."""
    return (images.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Zoom, turn and move each image a little, and change its contrast and brightness; it is not mirrored.

    (A mirrored chest has its heart on the wrong side.)

    Args:
        pixels: (B, 3, H, W) float32 in [-1, 1].
        generator: on the CPU; it draws the same for any device.
    """
    draws = torch.rand(len(pixels), 6, generator=generator) * 2 - 1
    zoom, angle = 1 + MAX_ZOOM * draws[:, 0], torch.deg2rad(MAX_DEGREES * draws[:, 1])
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    right, down = MAX_SHIFT * draws[:, 2], MAX_SHIFT * draws[:, 3]
    maps = torch.stack([cos, -sin, right, sin, cos, down], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(maps, list(pixels.shape), align_corners=False).to(pixels.device)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    contrast, brightness = 1 + MAX_CONTRAST * draws[:, 4], MAX_BRIGHTNESS * draws[:, 5]
    return moved * contrast.view(-1, 1, 1, 1).to(moved) + brightness.view(-1, 1, 1, 1).to(moved)


def build(outputs: int, seed: int) -> ResNetForImageClassification:
    """Four stages of one basic block each, half a million weights, drawn by the seed; nothing is loaded."""
    config = ResNetConfig(
        num_channels=3, embedding_size=HIDDEN[0], hidden_sizes=list(HIDDEN), depths=[1] * len(HIDDEN),
        layer_type="basic", num_labels=outputs,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResNetForImageClassification(config).to(memory_format=torch.channels_last)  # pyright: ignore


def contents(network: nn.Module) -> bytes:
    """The weights in the safetensors format: what the file holds, and what the network's hash is taken of."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()})


def sha256(network: nn.Module) -> str:
    return hashlib.sha256(contents(network)).hexdigest()


def data_sha256(images: Tensor, labels: Iterable[str]) -> str:
    """A hash over the pixels of images and over their labels, in their order."""
    digest = hashlib.sha256(repr(tuple(images.shape)).encode())
    for chunk in images.split(BATCH):
        digest.update(chunk.contiguous().numpy().tobytes())
    digest.update("\0".join(labels).encode())
    return digest.hexdigest()


def save_network(path: Path, network: ResNetForImageClassification, facts: dict[str, Any]) -> None:
    """Write `path` (.safetensors) and beside it a JSON file with the facts and the weights' hash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents(network))
    outputs = network.config.num_labels
    write_json(path.with_suffix(".json"), facts | {"outputs": outputs, "sha256": sha256(network)})


def load_network(path: Path) -> tuple[ResNetForImageClassification, dict[str, Any]]:
    """A network that `save_network` has written, and its facts.

    Raises:
        UserError: if a file is missing, or the weights are not those that the JSON file was written for.
    """
    record = path.with_suffix(".json")
    try:
        facts = json.loads(record.read_text())
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != facts["sha256"]:
            raise ValueError(f"not the weights that {record.name} was written for")
        network = build(facts["outputs"], seed=0)
        network.load_state_dict(load(content))
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is no network that was fitted here ({reason}); fit it again") from error
    return network, facts
