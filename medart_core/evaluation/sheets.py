"""Pictures for the people who read a report: real beside generated, colours, and the closest pairs."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medart_core.evaluation.colour import BINS, histograms
from medart_core.evaluation.images import ImageSet
from medart_core.evaluation.privacy import Pair
from medart_core.pictures import GREY, image_grid

PANEL, EDGE = (340, 180), 24  # pixels of a histogram, and around it
CHANNELS = {"red": (200, 40, 40), "green": (30, 140, 50), "blue": (40, 70, 200)}


def write(
    folder: Path, sets: Mapping[str, ImageSet], colours: Mapping[str, np.ndarray], pairs: Sequence[Pair]
) -> list[str]:
    """Write grid.png, colours.png and, where there are pairs, closest.png with a table; returns the pictures' names.

    `colours` are rows of `ColourExtractor` of the sets `generated` and `real`; pairs are of `generated` and `train`.
    """
    class_grid(sets["generated"], sets["real"]).save(folder / "grid.png")
    colour_histograms(*(histograms(colours[side]) for side in ("generated", "real"))).save(folder / "colours.png")
    if not pairs:
        return ["grid.png", "colours.png"]
    generated, train = sets["generated"], sets["train"]
    closest_pairs(generated, train, pairs).save(folder / "closest.png")
    with open(folder / "closest.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["generated", "train", "distance"])
        table.writerows([generated.names[ours], train.names[theirs], distance] for ours, theirs, distance in pairs)
    return ["grid.png", "colours.png", "closest.png"]


def class_grid(generated: ImageSet, real: ImageSet, columns: int = 8) -> Image.Image:
    """Rows of real and of generated images, per class where both have classes; images are spread over the sets."""
    rows = examples(generated, real, columns)
    return image_grid(list(rows.values()), row_names=list(rows), cell=_cell(next(iter(rows.values()))[0]))


def examples(generated: ImageSet, real: ImageSet, count: int = 8) -> dict[str, list[Image.Image]]:
    """By class, where both sets have classes: a few real and a few generated images, spread over the sets."""
    rows = {}
    for label in generated.classes if real.labels and generated.labels else [None]:
        for side, images in (("real", real), ("generated", generated)):
            members = np.arange(len(images)) if label is None else images.rows_of(label)
            chosen = members[np.linspace(0, len(members) - 1, min(count, len(members))).round().astype(int)]
            rows[f"{side}: {label}" if label else side] = [images.image(int(row)) for row in chosen]
    return rows


def colour_histograms(generated: np.ndarray, real: np.ndarray) -> Image.Image:
    """Average histograms of the channels, two (3, BINS): real ones filled with grey, generated ones as lines."""
    width, height = PANEL
    sheet = Image.new("RGB", (len(CHANNELS) * (width + EDGE) + EDGE, height + 2 * EDGE), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for number, (name, ink) in enumerate(CHANNELS.items()):
        left, bottom = EDGE + number * (width + EDGE), EDGE + height
        top = max(generated[number].max(), real[number].max(), 1e-9)
        places = left + np.arange(BINS + 1) * width / BINS
        heights = [bottom - side[number] / top * height for side in (real, generated)]
        for one, other, y in zip(places, places[1:], heights[0], strict=False):
            draw.rectangle((one, y, other, bottom), (215, 215, 215))
        steps = [(x, y) for i, y in enumerate(heights[1]) for x in places[i : i + 2]]
        draw.line(steps, ink, 2)
        draw.line((left, bottom, left + width, bottom), GREY)
        draw.text((left, 4), f"{name}: generated (line), real (grey)", GREY, font)
        draw.text((left, bottom + 4), "dark", GREY, font)
        draw.text((left + width - 30, bottom + 4), "bright", GREY, font)
    return sheet


def closest_pairs(generated: ImageSet, train: ImageSet, pairs: Sequence[Pair], columns: int = 8) -> Image.Image:
    """Generated images above the training images nearest to them."""
    rows, names = [], []
    for start in range(0, len(pairs), columns):
        part = pairs[start : start + columns]
        rows += [[generated.image(ours) for ours, _, _ in part], [train.image(theirs) for _, theirs, _ in part]]
        names += [f"generated, {start + 1} to {start + len(part)}", f"nearest, {part[0][2]:.3g} to {part[-1][2]:.3g}"]
    return image_grid(rows, row_names=names, cell=_cell(rows[0][0]))


def _cell(image: Image.Image) -> int:
    return min(max(image.width, 64), 192)
