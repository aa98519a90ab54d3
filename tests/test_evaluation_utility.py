"""Utility: the four metrics by hand, and useful generated images told from useless ones."""

import numpy as np
import pytest
import torch

from medart_core.evaluation import utility
from medart_core.evaluation.measured import Measured
from medart_core.evaluation.utility import Examples

# Six images of classes 0 0 0 1 1 2, taken for 0 0 1 1 2 2.
TARGETS = np.array([0, 0, 0, 1, 1, 2])
GUESSES = np.eye(3)[[0, 0, 1, 1, 2, 2]]


def test_recalls_and_balanced_accuracy_by_hand():
    np.testing.assert_allclose(utility.recalls(GUESSES, TARGETS), [2 / 3, 1 / 2, 1])
    assert utility.balanced_accuracy(GUESSES, TARGETS) == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)


def test_macro_f1_by_hand():
    # precision 1, 1/2, 1/2 and recall 2/3, 1/2, 1
    assert utility.macro_f1(GUESSES, TARGETS) == pytest.approx((0.8 + 0.5 + 2 / 3) / 3)


def test_auroc_by_hand():
    """Class 1 has the scores .9 .4 against .1 .4: of four pairs three are in order and one is tied."""
    scores = np.array([0.1, 0.4, 0.9, 0.4])
    both = np.stack([1 - scores, scores], axis=1)
    assert utility.auroc(both, np.array([0, 0, 1, 1])) == pytest.approx((3 + 0.5) / 4)
    assert utility.auroc(np.full((4, 2), 0.5), np.array([0, 1, 0, 1])) == 0.5
    # One-vs-rest: classes 0 and 1 are ranked perfectly, class 2 is ranked below one of two others.
    three = np.array([[0.8, 0.1, 0.1], [0.1, 0.6, 0.3], [0.3, 0.5, 0.2]])
    assert utility.auroc(three, np.array([0, 1, 2])) == pytest.approx((1 + 1 + 0.5) / 3)


def test_auroc_agrees_with_counting_pairs():
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(3), 40).round(1)  # many ties
    targets = np.arange(40) % 3
    areas = []
    for number in range(3):
        ours, others = probabilities[targets == number, number], probabilities[targets != number, number]
        areas.append(np.mean([(a > b) + (a == b) / 2 for a in ours for b in others]))
    assert utility.auroc(probabilities, targets) == pytest.approx(np.mean(areas))


def test_a_class_that_does_not_occur_is_left_out():
    targets = np.array([0, 0, 0, 1, 1, 1])
    assert np.isnan(utility.recalls(GUESSES, targets)[2])
    assert utility.balanced_accuracy(GUESSES, targets) == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert utility.macro_f1(GUESSES, targets) == pytest.approx((0.8 + 0.4) / 2)
    assert np.isnan(utility.auroc(GUESSES, np.zeros(6, dtype=int)))


def bars(count: int, seed: int, *, classes_swapped: bool = False) -> Examples:
    """Class "a" is bright above, "b" is bright below; or the reverse."""
    noise = torch.randint(0, 120, (count, 3, 32, 32), generator=torch.Generator().manual_seed(seed))
    for row in range(count):
        half = slice(0, 16) if (row % 2 == 0) != classes_swapped else slice(16, 32)
        noise[row, :, half] += 90
    return Examples(noise.byte(), ["ab"[row % 2] for row in range(count)], [f"p{row // 4}" for row in range(count)])


def value(measured: Measured) -> float:
    assert measured.value is not None and measured.low is not None and measured.high is not None
    assert measured.low - 1e-9 <= measured.value <= measured.high + 1e-9
    return measured.value


def test_useful_and_useless_images_are_told_apart():
    good = utility.utility(bars(60, 0), bars(40, 1), bars(40, 2), seeds=(0, 1), steps=6)
    bad = utility.utility(bars(60, 0), bars(40, 1), bars(40, 2, classes_swapped=True), seeds=(0,), steps=6)
    name = "utility_synthetic_balanced_accuracy"
    assert value(good[name]) > 0.9 > 0.1 > value(bad[name])
    assert value(good["utility_ratio"]) > 0.9 and value(bad["utility_ratio"]) < 0.1
    assert good[name].floor == value(good["utility_real_balanced_accuracy"])
    assert (good[name].n_generated, good[name].n_real) == (40, 40) and "seeds: 2" in good[name].note
    assert {f"utility_both_{x}" for x in ("macro_f1", "auroc", "recall_a", "recall_b")} <= good.keys()
    assert len([value(one) for one in (*good.values(), *bad.values())]) == 2 * 16


def test_intervals_take_whole_patients():
    """Twenty images of each patient, all right or all wrong, say no more than one image does."""
    targets = np.array([0, 1] * 10)
    right = np.eye(2)[np.where(np.arange(20) < 6, 1 - targets, targets)]

    def width(copies: int, groups: list[int] | None) -> float:
        outputs = {arm: [np.repeat(right, copies, axis=0)] for arm in ("real", "synthetic", "both")}
        figures = utility._measure(outputs, np.repeat(targets, copies), ["a", "b"], groups, 1, 1)
        one = figures["utility_real_balanced_accuracy"]
        assert value(one) == pytest.approx(0.7)
        return (one.high or 0) - (one.low or 0)

    assert width(20, [row // 20 for row in range(400)]) == width(1, None) > 3 * width(20, None)


def test_without_generated_images_of_a_class_the_reason_is_given():
    images, labels, _ = bars(40, 2)
    only_a = Examples(images[::2], labels[::2])
    figures = utility.utility(bars(60, 0), bars(40, 1), only_a, seeds=(0,), steps=2)
    assert figures.keys() == {"utility_ratio"} and figures["utility_ratio"].value is None
    assert "synthetic images: no image is labelled 'b'" in figures["utility_ratio"].note


def test_every_fit_has_as_many_steps_and_a_seed_of_its_own_kind(monkeypatch):
    """The domain's extractor is fitted with small seeds; none of these networks may be that one."""
    calls = []

    class Undecided:
        def predict(self, images: torch.Tensor) -> torch.Tensor:
            return torch.full((len(images), 2), 0.5)

    monkeypatch.setattr(
        utility.classifier, "fit", lambda x, labels, **k: calls.append((len(labels), k)) or Undecided()
    )

    def blank(count: int) -> Examples:
        return Examples(torch.zeros(count, 3, 1, 1, dtype=torch.uint8), ["a", "b"] * (count // 2))

    figures = utility.utility(blank(2000), blank(10), blank(200), seeds=(0, 1), steps=500)
    assert [count for count, _ in calls] == [2000, 200, 2200] * 2
    assert [k["epochs"] * (count * 4 // 5 // 64) for count, k in calls[:3]] == pytest.approx([500, 500, 500], abs=20)
    assert {k["seed"] for _, k in calls} == {1000, 1001}
    assert value(figures["utility_both_auroc"]) == 0.5 and value(figures["utility_ratio"]) == 1
