"""The Inception network of FID, from a file whose hash is checked, and its features under a stated resize rule."""

import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medart_core import sources
from medart_core.errors import UserError

SIDE, NUM_FEATURES, SPATIAL = 299, 2048, 17 * 17 * 7
BY_HAND = "run python prepare.py inception, or give a file with --inception"
NO_CLASSIFIER = "the Inception file has no classifier; give torch-fidelity's with --inception"
# resize rules: Pillow's antialiased bicubic filter, as clean-fid has it, and TensorFlow 1's bilinear one, which skips
# pixels when it shrinks and is what the literature's numbers were made with
RESIZE = {"antialias": "bicubic with antialias to 299", "tf1": "TensorFlow 1 bilinear to 299"}


# --- The network ---


class Conv(nn.Module):
    """Convolution, batch norm without scale, ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: int | tuple[int, int], stride: int = 1, padding: bool = True):
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        self.stride, self.padding = stride, tuple(side // 2 for side in sides) if padding else (0, 0)
        self.weight = nn.Parameter(torch.zeros(c_out, c_in, *sides))
        self.beta, self.mean, self.var = (nn.Parameter(torch.full((c_out,), float(v))) for v in (0, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, None, self.stride, self.padding)
        return F.relu(F.batch_norm(x, self.mean, self.var, None, self.beta, eps=1e-3))


def tower(channels: list[int], kernels: list, stride: int = 1, pool: nn.Module | None = None) -> nn.Sequential:
    """A chain of convolutions named conv, conv_1, ...; a stride belongs to the last one, which is then not padded."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(pool=pool) if pool else OrderedDict()
    for i, kernel in enumerate(kernels):
        last = stride > 1 and i == len(kernels) - 1
        conv = Conv(channels[i], channels[i + 1], kernel, stride if last else 1, padding=not last)
        layers[f"conv_{i}" if i else "conv"] = conv
    return nn.Sequential(layers)


def average() -> nn.Module:
    return nn.AvgPool2d(3, 1, 1, count_include_pad=False)


class Parallel(nn.Module):
    """Branches side by side, concatenated over channels."""

    def __init__(self, **branches: nn.Module):
        super().__init__()
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.children()], dim=1)


class InceptionE(nn.Module):
    """The last two blocks, whose towers fork; their names are flat in the files."""

    def __init__(self, c: int, pool: nn.Module):
        super().__init__()
        self.conv = Conv(c, 320, 1)
        self.tower_conv = Conv(c, 384, 1)
        self.tower_mixed_conv, self.tower_mixed_conv_1 = Conv(384, 384, (1, 3)), Conv(384, 384, (3, 1))
        self.tower_1_conv, self.tower_1_conv_1 = Conv(c, 448, 1), Conv(448, 384, 3)
        self.tower_1_mixed_conv, self.tower_1_mixed_conv_1 = Conv(384, 384, (1, 3)), Conv(384, 384, (3, 1))
        self.tower_2_pool, self.tower_2_conv = pool, Conv(c, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.tower_conv(x), self.tower_1_conv_1(self.tower_1_conv(x))
        forks = [self.tower_mixed_conv(a), self.tower_mixed_conv_1(a)]
        forks += [self.tower_1_mixed_conv(b), self.tower_1_mixed_conv_1(b)]
        return torch.cat([self.conv(x), *forks, self.tower_2_conv(self.tower_2_pool(x))], dim=1)


def block_a(c: int, pooled: int) -> Parallel:
    towers = tower([c, 48, 64], [1, 5]), tower([c, 64, 96, 96], [1, 3, 3])
    return Parallel(
        conv=Conv(c, 64, 1), tower=towers[0], tower_1=towers[1], tower_2=tower([c, pooled], [1], 1, average())
    )


def block_c(c: int, inner: int) -> Parallel:
    short, long = [1, (1, 7), (7, 1)], [1, (7, 1), (1, 7), (7, 1), (1, 7)]
    return Parallel(
        conv=Conv(c, 192, 1),
        tower=tower([c, inner, inner, 192], short),
        tower_1=tower([c, inner, inner, inner, inner, 192], long),
        tower_2=tower([c, 192], [1], 1, average()),
    )


def build() -> nn.Sequential:
    """The network of 2015-12-05 up to its pooled features, with zero weights: (B, 3, 299, 299) -> (B, 2048, 1, 1).

    Layers are named as in the TensorFlow graph (arXiv:1512.00567; FID's variant pools without counting the padding).
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv"], layers["conv_1"] = Conv(3, 32, 3, 2, padding=False), Conv(32, 32, 3, padding=False)
    layers["conv_2"], layers["pool0"] = Conv(32, 64, 3), nn.MaxPool2d(3, 2)
    layers["conv_3"], layers["conv_4"] = Conv(64, 80, 1), Conv(80, 192, 3, padding=False)
    layers["pool1"] = nn.MaxPool2d(3, 2)
    layers["mixed"], layers["mixed_1"], layers["mixed_2"] = block_a(192, 32), block_a(256, 64), block_a(288, 64)
    layers["mixed_3"] = Parallel(
        conv=Conv(288, 384, 3, 2, padding=False), tower=tower([288, 64, 96, 96], [1, 3, 3], 2), pool=nn.MaxPool2d(3, 2)
    )
    for name, inner in (("mixed_4", 128), ("mixed_5", 160), ("mixed_6", 160), ("mixed_7", 192)):
        layers[name] = block_c(768, inner)
    layers["mixed_8"] = Parallel(
        tower=tower([768, 192, 320], [1, 3], 2),
        tower_1=tower([768, 192, 192, 192, 192], [1, (1, 7), (7, 1), 3], 2),
        pool=nn.MaxPool2d(3, 2),
    )
    layers["mixed_9"], layers["mixed_10"] = InceptionE(1280, average()), InceptionE(2048, nn.MaxPool2d(3, 1, 1))
    layers["pool2"] = nn.AvgPool2d(8)
    return nn.Sequential(layers).eval().requires_grad_(False)


# --- Its weights ---


def read_weights(file: Path) -> tuple[dict[str, Tensor], Tensor | None, str]:
    """Weights for `build()`, the classifier's matrix (1008, 2048) if the file has one, and the file's sha256.

    A TorchScript archive holds code, so it is opened only if its sha256 is the one that is known here. The file
    `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity holds tensors only, and is read as such.

    Raises:
        UserError: if the file is missing, or is neither of the two.
    """
    if not file.is_file():
        raise UserError(f"{file} does not exist; {BY_HAND}")
    sha256 = sources.sha256_of(file)
    if sha256 == sources.INCEPTION_SHA256:
        weights = torch.jit.load(file, map_location="cpu").state_dict()
        return {name.removeprefix("net.layers."): value for name, value in weights.items()}, None, sha256
    promised = re.search(r"-([0-9a-f]{8,64})\.pth$", file.name)  # as torch.hub names files by their sha256
    if promised and not sha256.startswith(promised[1]):
        raise UserError(f"{file} is damaged: its sha256 is {sha256}, not {promised[1]}...; download it again")
    try:
        with warnings.catch_warnings(action="ignore"):  # of a TorchScript archive torch warns, and then refuses it
            weights = torch.load(file, map_location="cpu", weights_only=True)
        fc = weights["fc.weight"]
        return _renamed(weights), fc, sha256
    except Exception as error:  # a foreign file may fail in any way
        raise UserError(
            f"{file} (sha256 {sha256}) is neither the Inception of prepare.py nor torch-fidelity's; {BY_HAND}"
        ) from error


def _renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torch-fidelity's tensors under the names of `build()`: the layers stand in the same order in both."""
    theirs = [name.removesuffix(".conv.weight") for name in weights if name.endswith(".conv.weight")]
    ours = [name.removesuffix(".weight") for name in build().state_dict() if name.endswith(".weight")]
    renamed = {}
    for name, their in zip(ours, theirs, strict=True):
        scale = weights[f"{their}.bn.weight"]
        renamed[f"{name}.weight"] = weights[f"{their}.conv.weight"] * scale[:, None, None, None]
        renamed[f"{name}.beta"] = weights[f"{their}.bn.bias"]
        renamed[f"{name}.mean"] = weights[f"{their}.bn.running_mean"] * scale
        renamed[f"{name}.var"] = weights[f"{their}.bn.running_var"]
    return renamed


# --- As an extractor ---


def resize(images: Tensor, rule: str) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 (B, 3, 299, 299) in [0, 255] by one of the rules in RESIZE."""
    pixels = images.float()
    if rule == "antialias":
        return F.interpolate(pixels, (SIDE, SIDE), mode="bicubic", antialias=True).round().clamp(0, 255)
    for axis in (2, 3):  # TensorFlow 1: output i is at i * size / 299 of the input, edges repeated
        size = pixels.shape[axis]
        place = torch.arange(SIDE, device=images.device) * (size / SIDE)
        left = place.floor().long()
        weight = (place - left).view(-1, *[1] * (3 - axis))
        right = (left + 1).clamp(max=size - 1)
        one, other = pixels.index_select(axis, left), pixels.index_select(axis, right)
        pixels = one + (other - one) * weight
    return pixels


class Inception:
    """Pooled features, and with `spatial` behind them the 7 x 17 x 17 first ones of a middle layer (sFID)."""

    def __init__(self, file: Path, rule: str = "antialias", spatial: bool = False, device: torch.device | None = None):
        """Raises UserError if `file` cannot be used."""
        weights, self.classifier, sha256 = read_weights(file)
        self.network = build()
        try:
            self.network.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"{file} does not hold the FID Inception's tensors; {BY_HAND}") from error
        self.network.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.device, self.rule, self.spatial = device, rule, spatial
        self.name = f"inception-2015-12-05{' with mixed_6/conv' if spatial else ''} ({RESIZE[rule]})"
        self.sha256 = sha256
        self.num_features = NUM_FEATURES + (SPATIAL if spatial else 0)

    def __call__(self, images: Tensor, /) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 2048) or (B, 2048 + 2023)."""
        x = (resize(images.to(self.device), self.rule) - 128) / 128
        tap = None
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for name, layer in self.network.named_children():
                if name == "mixed_6" and self.spatial:
                    tap = layer.get_submodule("conv")(x)[:, :7].permute(0, 2, 3, 1).flatten(1)
                x = layer(x)
        features = x.flatten(1)
        return features if tap is None else torch.cat([features, tap], dim=1)

    def probabilities(self, features: Tensor) -> Tensor | None:
        """Class probabilities of pooled features, (N, 1008), without a bias as in ADM; None without a classifier."""
        if self.classifier is None:
            return None
        return (features[:, :NUM_FEATURES] @ self.classifier.T.to(features)).softmax(dim=1)
