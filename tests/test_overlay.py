"""The content mask on drawn endoscope frames, where the tissue is known."""

import pytest
import torch

from medart_core.overlay import content_mask

SIDE = 128
TISSUE, BLACK, WHITE, INSET_GREEN = (190, 90, 70), (3, 4, 3), (235, 235, 235), (40, 120, 70)


def paint(image: torch.Tensor, where, color) -> None:
    image[:, where] = torch.tensor(color, dtype=torch.float32)[:, None]


def rectangle(top: int, bottom: int, left: int, right: int, side: int = SIDE) -> torch.Tensor:
    where = torch.zeros(side, side, dtype=torch.bool)
    where[top:bottom, left:right] = True
    return where


def octagon(side: int = SIDE) -> torch.Tensor:
    """An octagon with a margin of a sixteenth and cut corners, as an endoscope's frame has."""
    y, x = ((torch.arange(side) - (side - 1) / 2).abs()[:, None], (torch.arange(side) - (side - 1) / 2).abs()[None])
    half = side * 7 / 16
    return (y < half) & (x < half) & (x + y < 1.5 * half)


def frame(side: int = SIDE, noise: float = 4) -> torch.Tensor:
    """Noisy tissue in an octagon on black, in units of 255."""
    image = torch.zeros(3, side, side)
    paint(image, torch.ones(side, side, dtype=torch.bool), BLACK)
    paint(image, octagon(side), TISSUE)
    return image + noise * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))


def mask_of(image: torch.Tensor) -> torch.Tensor:
    return content_mask(image[None] / 127.5 - 1)[0, 0]


def share_of_errors(mask: torch.Tensor, expected: torch.Tensor) -> float:
    return (mask != expected).float().mean().item()


@pytest.mark.parametrize("side", [32, 128, 512])
def test_the_black_border_is_left_out(side):
    mask = mask_of(frame(side))
    assert mask.shape == (side, side) and mask.dtype == torch.bool
    assert share_of_errors(mask, octagon(side)) < 0.005


def test_a_dark_lumen_in_the_middle_is_tissue():
    image = frame()
    paint(image, rectangle(45, 80, 50, 85), BLACK)
    assert share_of_errors(mask_of(image), octagon()) < 0.005


def test_dark_red_tissue_at_the_edge_is_no_border():
    image = torch.empty(3, SIDE, SIDE)
    paint(image, rectangle(0, SIDE, 0, SIDE), TISSUE)
    paint(image, rectangle(30, 90, 0, 60), (45, 12, 10))
    assert mask_of(image).all()


def test_text_on_the_border_and_specks_are_border():
    image = frame(512)
    for left in range(4, 60, 8):  # strokes of letters, 2 pixels wide
        paint(image, rectangle(20, 34, left, left + 2, 512), WHITE)
    specks = torch.rand(512, 512, generator=torch.Generator().manual_seed(1)) < 0.02
    paint(image, specks, WHITE)
    assert share_of_errors(mask_of(image), octagon(512)) < 0.005


def test_a_label_on_the_border_does_not_hide_the_black_behind_it():
    image, label = frame(), rectangle(4, 14, 4, 14)
    paint(image, label, WHITE)
    assert share_of_errors(mask_of(image), octagon() | label) < 0.005


@pytest.mark.parametrize("flips", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("border", [True, False])
def test_the_green_inset_is_left_out_in_every_corner(flips, border):
    image, tissue = frame(), octagon()
    if not border:
        tissue = rectangle(0, SIDE, 0, SIDE)
        paint(image, tissue, TISSUE)
    box = rectangle(85, 124, 3, 43)
    paint(image, box, INSET_GREEN)
    paint(image, rectangle(88, 92, 6, 30), WHITE)  # text
    paint(image, rectangle(95, 120, 20, 24), (200, 210, 200))  # the drawn scope
    image = image.flip([dim + 1 for dim in flips])
    assert share_of_errors(mask_of(image), (tissue & ~box).flip(flips)) < 0.005


def test_green_noise_does_not_widen_the_inset():
    image = torch.empty(3, SIDE, SIDE)
    paint(image, rectangle(0, SIDE, 0, SIDE), TISSUE)
    specks = torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(1)) < 0.02
    paint(image, specks, (0, 255, 0))
    box = rectangle(85, 124, 3, 43)
    paint(image, box, INSET_GREEN)
    assert torch.equal(mask_of(image), ~box)


def test_pictures_without_border_keep_everything():
    generator = torch.Generator().manual_seed(2)
    smooth = torch.nn.functional.interpolate(torch.rand(4, 1, 6, 6, generator=generator), SIDE, mode="bicubic")
    meadow = torch.empty(1, 3, SIDE, SIDE)
    paint(meadow[0], rectangle(0, SIDE, 0, SIDE), INSET_GREEN)
    noise = torch.rand(1, 3, SIDE, SIDE, generator=generator)
    tissue = (0.3 + 0.6 * smooth) * torch.tensor([1, 0.5, 0.4])[:, None, None]
    for pictures in (tissue, meadow / 255, noise):
        assert content_mask(2 * pictures - 1).all()


@pytest.mark.parametrize("green", [rectangle(0, SIDE, 0, 64), rectangle(2, 8, 2, 8)])
def test_green_beyond_the_corner_and_a_green_spot_are_no_inset(green):
    image = torch.empty(3, SIDE, SIDE)
    paint(image, rectangle(0, SIDE, 0, SIDE), TISSUE)
    paint(image, green, INSET_GREEN)
    assert mask_of(image).all()


def test_an_image_with_hardly_any_content_keeps_everything_and_others_are_not_touched():
    dark = torch.zeros(3, SIDE, SIDE)
    paint(dark, rectangle(50, 80, 50, 80), TISSUE)
    masks = content_mask(torch.stack([dark, frame()]) / 127.5 - 1)
    assert masks.shape == (2, 1, SIDE, SIDE) and masks[0].all() and torch.equal(masks[1, 0], mask_of(frame()))


def test_half_precision_and_images_that_are_not_square():
    image = frame()[:, 16:]
    assert torch.equal(content_mask((image[None] / 127.5 - 1).bfloat16().requires_grad_())[0, 0], mask_of(image))
