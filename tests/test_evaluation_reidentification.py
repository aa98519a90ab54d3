"""Patient re-identification on made-up patients: each has a pattern of her own, and every image its own noise."""

import numpy as np
import pytest
import torch

from medart_core.errors import UserError
from medart_core.evaluation import reidentification
from medart_core.evaluation.measured import Measured
from medart_core.evaluation.utility import Examples

SIDE = 32


def patients(first: int, count: int, images: int = 2) -> Examples:
    """`images` images of each of `count` patients; patients of different numbers have different patterns."""
    pixels = []
    for patient in range(first, first + count):
        coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(patient))
        pattern = torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear")
        noise = torch.rand(images, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(10_000 + patient))
        pixels.append((200 * pattern + 55 * noise).byte())
    groups = [f"person{patient}" for patient in range(first, first + count) for _ in range(images)]
    return Examples(torch.cat(pixels), ["ab"[number % 2] for number in range(len(groups))], groups)


def value(measured: Measured) -> float:
    assert measured.value is not None and measured.low is not None and measured.high is not None
    assert measured.low <= measured.value <= measured.high
    return measured.value


TRAIN, HELD_OUT, NEW = patients(0, 80), patients(100, 40), patients(200, 20, images=1)


@pytest.fixture(scope="module")
def embedding() -> reidentification.PatientEmbedding:
    return reidentification.fit(TRAIN, seed=0, steps=25)


def test_it_tells_unseen_patients_apart(embedding):
    figures, _ = reidentification.reidentify(embedding, NEW.images, TRAIN, HELD_OUT)
    assert value(figures["reid_accuracy"]) > 0.85 and value(figures["reid_auroc"]) > 0.9
    assert figures["reid_accuracy"].n_real == 80 and figures["reid_accuracy"].floor == 0.5
    assert "80 patients with several images to learn from, 40 unseen" in figures["reid_auroc"].note
    assert 0 <= (figures["reid_matches"].floor or 0) <= 0.15
    assert value(figures["reid_copy_sensitivity"]) > 0.8 < value(figures["reid_sensitivity"])
    assert "recognises" in figures["reid_matches"].note


def test_other_images_of_training_patients_are_matched_first(embedding):
    """A quarter and a half of the generated images show training patients, in images that training has not seen."""
    seen_again = patients(0, 10, images=3).images[2::3]
    values = []
    for repeated in (0, 5, 10):
        generated = torch.cat([NEW.images[repeated:], seen_again[:repeated]])
        figures, matches = reidentification.reidentify(embedding, generated, TRAIN, HELD_OUT)
        values.append(value(figures["reid_matches"]))
        right = {match.generated for match in matches if match.train // 2 == match.generated - (20 - repeated)}
        assert len(right & set(range(20 - repeated, 20))) >= 0.6 * repeated
        assert [match.distance for match in matches] == sorted(match.distance for match in matches)
    assert values == sorted(values) and values[0] < values[2]


def test_the_same_seed_gives_the_same_network_and_it_can_be_kept(embedding, tmp_path):
    assert np.array_equal(reidentification.fit(TRAIN, seed=0, steps=2)(NEW.images),
                          reidentification.fit(TRAIN, seed=0, steps=2)(NEW.images))  # fmt: skip
    embedding.save(tmp_path / "patients.safetensors")
    loaded = reidentification.PatientEmbedding.load(tmp_path / "patients.safetensors")
    vectors = loaded(NEW.images)
    assert np.array_equal(vectors, embedding(NEW.images)) and loaded.facts["patients"] == 80
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


def test_thresholds_come_from_the_other_half():
    scores, half = np.array([[0.9, 0.1], [0.4, 0.3], [0.8, 0.2], [0.5, 0.45]]), np.array([0, 1, 0, 1])
    limits = reidentification._from_other_half(scores, half, reidentification._best_threshold)
    assert limits.tolist() == [0.4, 0.8, 0.4, 0.8]
    assert reidentification._best_threshold(np.array([[0.9, 0.1], [0.6, 0.5]])) == 0.6


def test_training_pairs_are_different_images_of_one_patient():
    members = [[0, 1, 2], [3, 4], [5], [6]]
    rows = next(reidentification._training_pairs(members, seed=0))
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    owner = {row: number for number, group in enumerate(members) for row in group}
    assert sorted(owner[row] for row in first) == [0, 1, 2, 3]
    assert [owner[row] for row in first] == [owner[row] for row in second]
    assert [one == other for one, other in zip(first, second, strict=True)] == [False, False, True, True]


def test_too_few_patients(embedding):
    with pytest.raises(UserError, match="5 patients have several images"):
        reidentification.fit(patients(0, 5), seed=0)
    figures, matches = reidentification.reidentify(embedding, NEW.images, TRAIN, patients(100, 5))
    assert matches == [] and all(one.value is None and "5 held-out" in one.note for one in figures.values())


def test_patients_by_file_name():
    names = ["person7_bacteria_1.jpeg", "a/person7_virus_2.jpeg", "IM-0115-0001.jpeg", "NORMAL2-IM-0115-0001.jpeg"]
    assert reidentification.patients_of(names) == ["person7", "person7", "IM-0115", "NORMAL2-IM-0115"]
    assert reidentification.patients_of([*names, "cat.png"]) is None
