"""Privacy: planted copies move every figure in order and are listed first; new images move none."""

import numpy as np
import pytest
import torch
from PIL import Image

from medart_core.evaluation import privacy
from medart_core.evaluation.measured import Measured
from medart_core.evaluation.shares import share

SHARES = (0, 0.05, 0.2, 0.5)


def value(measured: Measured) -> float:
    assert measured.value is not None and measured.low is not None and measured.high is not None
    assert measured.low <= measured.value <= measured.high
    return measured.value


def vectors(count: int, seed: int, dimensions: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dimensions))


def planted(part: float, noise: float = 0.01) -> np.ndarray:
    """400 new vectors of which some are replaced by blurred copies of training vectors: row i by vector i."""
    generated, copies = vectors(400, 2), round(400 * part)
    generated[:copies] = vectors(1000, 0)[:copies] + noise * vectors(copies, 3)
    return generated


@pytest.fixture(scope="module")
def figures() -> list[dict[str, Measured]]:
    return [privacy.distance_figures(planted(part), vectors(1000, 0), vectors(300, 1)) for part in SHARES]


@pytest.mark.parametrize(("name", "sign"), [("authpct", -1), ("authpct_gap", -1), ("near_share", 1)])
def test_planted_copies_move_the_figure_in_order(figures, name, sign):
    values = [value(one[name]) for one in figures]
    assert values == sorted(values, key=lambda one: sign * one) and len(set(values)) == len(SHARES)


def test_without_copies_generated_images_are_like_held_out_ones(figures):
    none, half = figures[0], figures[-1]
    gap, authpct, near = none["authpct_gap"], none["authpct"], none["near_share"]
    assert (gap.low or 0) < 0 < (gap.high or 0) and abs(gap.floor or 0) < 8
    assert value(authpct) == pytest.approx(authpct.floor, abs=6)
    assert value(near) < 0.04 and near.floor == 0.01
    assert value(half["authpct_gap"]) == pytest.approx(value(authpct) / -2, abs=3)
    assert value(half["near_share"]) > 0.49
    distance = none["nearest_distance"]
    assert value(distance) == pytest.approx(distance.floor, rel=0.1)
    assert (distance.n_generated, distance.n_real) == (400, 1000)


def test_planted_pairs_are_listed_first():
    pairs = privacy.closest_pairs(planted(0.05), vectors(1000, 0))
    assert len(pairs) == privacy.NUM_PAIRS
    assert {(pair.generated, pair.train) for pair in pairs[:20]} == {(row, row) for row in range(20)}
    assert pairs[19].distance < 0.1 < pairs[20].distance


def test_authenticity_on_a_line_is_one_third_whatever_the_number():
    """Two thirds of random points on a line have a mutual nearest neighbour (P. J. Clark, Science 123, 1956)."""
    random = np.random.default_rng(0)
    for count in (100, 1000):
        lines = [privacy.is_authentic(random.random((count, 1)), random.random((count, 1))) for _ in range(20)]
        assert np.mean(lines) == pytest.approx(1 / 3, abs=0.03)


def test_exact_copies_are_never_authentic():
    train = vectors(50, 0, 30) * 1e3
    assert not privacy.is_authentic(train, train).any()
    twice = np.concatenate([train, train])
    assert not privacy.is_authentic(train, twice).any()


def test_too_few_images_give_no_figure_but_the_reason():
    few = privacy.distance_figures(vectors(400, 0), vectors(400, 1), vectors(8, 2))
    assert all(one.value is None and "8 held-out images are too few" in one.note for one in few.values())


def test_pixel_distance_is_the_root_mean_square():
    images = torch.zeros(2, 3, 50, 50, dtype=torch.uint8)
    images[1] = 51
    one, other = privacy.pixel_vectors(images)
    assert np.linalg.norm(one - other) == pytest.approx(0.2, rel=1e-5)


def test_hashes_find_the_copies_of_x_rays(x_rays, tmp_path):
    """Half of the X-rays are 'training images'; their copies as small JPEGs are found, the other ones are not."""
    images = [Image.open(path).convert("RGB") for path in sorted(x_rays.glob("*.jp*g"))]
    train, new = images[:6], images[6:]
    copies = []
    for number, image in enumerate(train[:2]):
        image.resize((image.width // 2, image.height // 2)).save(tmp_path / f"{number}.jpg", quality=70)
        copies.append(Image.open(tmp_path / f"{number}.jpg"))
    generated, known, held_out = (privacy.hashes(some) for some in ([*new[:3], *copies], train, new[3:]))
    assert [(pair.generated, pair.train) for pair in sorted(privacy.duplicates(generated, known))] == [(3, 0), (4, 1)]
    measured = privacy.duplicate_share(generated, known, held_out)
    assert value(measured) == 0.4 and measured.floor == 0


def test_wilson_interval_of_a_textbook_case():
    """10 of 100: 5.52 % to 17.44 % (A. Agresti and B. A. Coull, 1998)."""
    assert share(10, 100) == pytest.approx((0.1, 0.0552, 0.1744), abs=1e-4)
    value, low, high = share(0, 20)
    assert value == low == 0 and 0.1 < high < 0.2
    assert share(20, 20)[2] == 1
