"""What is not tissue in an endoscope's frame: its black border and the green inset with the scope's position."""

import torch
from torch import Tensor
from torch.nn import functional as F

BLACK = 24 / 255  # largest channel, of [0, 1]: a JPEG's black border stays below; a dark lumen is red and lies above
SPECK = 1 / 100  # half a window's side, of the image's: a frame's text counts as the black around it
GREEN = 20 / 255  # by how much green exceeds red and blue: tissue is red, bile yellow, dye blue
ZONE = 0.45  # of each side: an inset ends within this corner (Kvasir's takes about a third)
INSET_SIDE = 0.08  # of each side: a smaller green rectangle is no inset
INSET_FILL = 0.6  # green share of the rectangle: the rest is the drawn scope and text
MIN_CONTENT = 0.25  # of the image: frames show more, and less is no fair sample of the colours


@torch.no_grad()
def content_mask(pixels: Tensor) -> Tensor:
    """True where a pixel shows tissue: (B, 1, H, W) bool; all True for an image with hardly any.

    The border is what straight lines from the image's four sides cross before they meet anything brighter than black.
    Around convex content, such as an endoscope's circle or octagon, that is all black but none of the dark within.

    Args:
        pixels: (B, 3, H, W) in about [-1, 1].
    """
    values = (pixels.float() + 1) / 2
    inset = green_inset(values)
    content = ~(inset | from_the_sides(near_black(values) | inset))
    return content | (content.float().mean(dim=(1, 2, 3), keepdim=True) < MIN_CONTENT)


def near_black(values: Tensor) -> Tensor:
    """Where most of the pixels around are nearly black: (B, 1, H, W) bool of (B, 3, H, W) in [0, 1]."""
    black = (values.amax(dim=1, keepdim=True) < BLACK).float()
    radius = round(SPECK * min(values.shape[-2:]))
    return F.avg_pool2d(black, 2 * radius + 1, 1, radius, count_include_pad=False) > 0.5


def from_the_sides(region: Tensor) -> Tensor:
    """Pixels whose row or column lies in `region` from one of its ends up to them, (..., H, W) bool."""
    reached = torch.zeros_like(region)
    for dim in (-2, -1):
        reached |= region.int().cumprod(dim).bool()
        reached |= region.flip(dim).int().cumprod(dim).flip(dim).bool()
    return reached


def green_inset(values: Tensor) -> Tensor:
    """The rectangles that strongly green pixels fill in the corners: (B, 1, H, W) bool of (B, 3, H, W) in [0, 1]."""
    red, green, blue = values.unbind(1)
    is_green = green - torch.maximum(red, blue) > GREEN
    inset = torch.zeros_like(is_green)
    for flips in ((), (-1,), (-2,), (-2, -1)):  # each corner in turn becomes the upper left one
        inset |= corner_rectangle(is_green.flip(flips)).flip(flips)
    return inset.unsqueeze(1)


def corner_rectangle(is_green: Tensor) -> Tensor:
    """The rectangle around the upper left corner's green rows and columns, (B, H, W) bool; empty if it is no inset.

    It spans the rows and columns with at least half as much green as the greenest one, so noise does not widen it.
    """
    height, width = is_green.shape[-2:]
    zone = is_green[:, : int(ZONE * height), : int(ZONE * width)]
    rows, columns = extent(zone.sum(dim=2)), extent(zone.sum(dim=1))
    box = rows[:, :, None] & columns[:, None, :]
    large = (rows.sum(dim=1) >= INSET_SIDE * height) & (columns.sum(dim=1) >= INSET_SIDE * width)
    filled = (zone & box).sum(dim=(1, 2)) >= INSET_FILL * box.sum(dim=(1, 2))
    ends = ~(rows[:, -1] | columns[:, -1])  # a picture that is green beyond the corner has no inset there
    box &= (large & filled & ends)[:, None, None]
    return F.pad(box, (0, width - zone.shape[2], 0, height - zone.shape[1]))


def extent(counts: Tensor) -> Tensor:
    """True from the first to the last entry of at least half the largest one, (B, N) bool of (B, N) counts."""
    high = (2 * counts >= counts.amax(dim=1, keepdim=True).clamp(min=1)).int()
    return (high.cummax(dim=1).values & high.flip(1).cummax(dim=1).values.flip(1)).bool()
