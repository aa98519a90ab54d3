"""Attributes measured on pixels: synthetic images whose attributes are known, and independence of size and name."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medart_core import attributes
from medart_core.attributes import VALUES, measure
from medart_core.images import open_image

BODY, LUNG = 0.62, 0.38


def chest(left=LUNG, right=LUNG, body=BODY, marker=0.0, outside=0.05) -> Image.Image:
    """A crude chest of 224 px: dark sides, a grey body with two lung fields, a letter-like block at the left edge."""
    grey = np.full((224, 224), outside)
    grey[:, 30:194] = body
    grey[45:160, 38:96], grey[45:160, 128:186] = left, right
    if marker:
        grey[60:70, 8:16] = marker
    return Image.fromarray((np.repeat(grey[..., None], 3, axis=2) * 255).round().astype(np.uint8))


@pytest.mark.parametrize(
    ("name", "images"),
    [
        ("exposure", {"dark": chest(), "balanced": chest(body=0.75), "bright": chest(body=0.9)}),
        ("contrast", {"low": chest(outside=0.4), "high": chest(left=0.1, right=0.1)}),
        ("haze", {"clear": chest(0.3, 0.3), "slight": chest(0.43, 0.43), "hazy": chest(0.55, 0.55)}),
        ("side", {"left brighter": chest(left=0.5), "even": chest(), "right brighter": chest(right=0.5)}),
        ("marker", {"faint": chest(marker=0.15), "plain": chest(marker=0.95)}),
    ],
)
def test_chest_x_rays(name, images):
    assert {value: measure("chest-xray", image)[name] for value, image in images.items()} == {v: v for v in images}


def test_a_mirrored_chest_has_its_other_side_brighter_and_all_else_alike():
    image = chest(right=0.5, marker=0.95)
    mirrored = measure("chest-xray", image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert mirrored == measure("chest-xray", image) | {"side": "left brighter"}


def speckled(colour, spread, seed=0) -> Image.Image:
    noise = np.random.default_rng(seed).normal(0, spread, (32, 32, 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


def test_dermoscopy():
    brown = (170, 120, 75)
    found = [measure("dermoscopy", speckled(brown, spread)) for spread in (2, 11, 30)]
    assert [values["variegation"] for values in found] == ["even", "varied", "mottled"]
    assert {values["colour"] for values in found} == {"light brown"}
    ramp, step = np.zeros((32, 32, 3)), np.zeros((32, 32, 3))
    ramp[:] = np.linspace(100, 150, 32)[None, :, None]
    step[:], step[:, 16:] = 100, 150
    borders = [measure("dermoscopy", Image.fromarray(image.astype(np.uint8)))["border"] for image in (ramp, step)]
    assert borders == ["soft", "sharp"]


def test_histology():
    pink, nucleus, brown, blue, glass = (215, 110, 150), (70, 40, 100), (150, 110, 70), (140, 150, 190), (244,) * 3
    tile = np.zeros((128, 128, 3), np.uint8)
    for background, spot, stain in ((pink, nucleus, "H&E"), (brown, blue, "IHC")):
        for share, nuclei in ((0, "few"), (0.08, "some"), (0.3, "many")):
            for bare, space in ((0, "closed"), (0.25, "partly open"), (0.5, "mostly open")):
                tile[:] = background
                tile[: round(128 * share)] = spot
                if bare:
                    tile[-round(128 * bare) :] = glass
                found = measure("histology", Image.fromarray(tile))
                assert found == {"stain": stain, "nuclei": nuclei, "space": space}
    assert measure("histology", Image.new("RGB", (64, 64), "white"))["space"] == "mostly open"


def test_photographs():
    colours = {
        (40, 60, 90): ("dark", "cool"),
        (120, 120, 118): ("balanced", "neutral"),
        (220, 180, 90): ("bright", "warm"),
    }
    for colour, said in colours.items():
        assert tuple(measure("photograph", Image.new("RGB", (50, 30), colour)).values()) == said


def test_real_x_rays_use_the_table_and_hardly_depend_on_the_size(x_rays: Path):
    with open(x_rays / "metadata.csv", newline="", encoding="utf-8") as file:
        names = [row["file_name"] for row in csv.DictReader(file)]
    changed, seen = 0, Counter()
    for name in names:
        image = open_image(x_rays / name)
        found = measure("chest-xray", image)
        assert {key: value in VALUES["chest-xray"][key] for key, value in found.items()} == dict.fromkeys(found, True)
        larger = measure("chest-xray", image.resize((300, 260), Image.Resampling.BICUBIC))
        changed += sum(larger[key] != found[key] for key in found if key != "marker")  # these copies blur letters
        seen.update(found.items())
    assert changed <= 3 and len(seen) >= 11  # of 48 and of 14


def test_every_domain_measures_what_its_table_names():
    image = speckled((120, 110, 100), 20)
    assert attributes.MEASURES.keys() == VALUES.keys()
    for domain, values in VALUES.items():
        found = measure(domain, image)
        assert found.keys() == values.keys() and all(found[key] in values[key] for key in values)
