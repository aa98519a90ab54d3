"""Prompt fidelity against counts made by hand."""

from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch

from medart_core.errors import UserError
from medart_core.evaluation import fidelity
from medart_core.evaluation.classifier import Classifier
from medart_core.evaluation.measured import Measured
from medart_core.evaluation.utility import Examples


@dataclass
class Told:
    """A classifier whose answer is the value of an image's first pixel."""

    classes: tuple[str, ...] = ("a", "b b", "c")
    name: str = "told"
    sha256: str = "0"

    def predict(self, images: torch.Tensor) -> torch.Tensor:
        return torch.eye(3)[images[:, 0, 0, 0].long()]


JUDGE = cast(Classifier, Told())


def examples(labels: str, seen: str) -> Examples:
    """Images of the classes a, b and c, and what the classifier sees in them."""
    names = dict(zip("abc", Told().classes, strict=True))
    values = torch.tensor(["abc".index(letter) for letter in seen], dtype=torch.uint8)
    return Examples(values.view(-1, 1, 1, 1).expand(-1, 3, 2, 2), [names[letter] for letter in labels])


def value(measured: Measured) -> float:
    assert measured.value is not None and measured.low is not None and measured.high is not None
    assert measured.low <= measured.value <= measured.high and measured.low < measured.high
    return measured.value


def test_classes_count_alike_and_only_those_asked_for():
    """Asked: a six times, all seen; b twice, once seen. On real images a is right in 3 of 4 and b in 4 of 4."""
    generated = examples("aaaaaabb", "aaaaaabc")
    held_out = examples("aaaabbbbcc", "aaabbbbbaa")
    figures = fidelity.class_agreement(JUDGE, generated, held_out)
    assert figures.keys() == {"class_agreement", "class_agreement_ratio", "class_agreement_a", "class_agreement_b_b"}
    agreement = figures["class_agreement"]
    assert value(agreement) == (1 + 0.5) / 2 and agreement.floor == (0.75 + 1) / 2
    assert value(figures["class_agreement_ratio"]) == pytest.approx(0.75 / 0.875)
    assert (agreement.n_generated, agreement.n_real, agreement.extractor) == (8, 8, "told")
    one = figures["class_agreement_b_b"]
    assert (value(one), one.n_generated, one.n_real, one.floor) == (0.5, 2, 4, 1)


def test_a_classifier_that_is_never_right_has_no_ratio():
    figures = fidelity.class_agreement(JUDGE, examples("ab", "ab"), examples("ab", "cc"))
    assert "class_agreement_ratio" not in figures and figures["class_agreement"].floor == 0


def test_unknown_and_missing_classes_are_refused():
    with pytest.raises(UserError, match="labelled 'odd'"):
        fidelity.class_agreement(JUDGE, examples("a", "a")._replace(labels=["odd"]), examples("a", "a"))
    with pytest.raises(UserError, match="no held-out image is labelled 'b b'"):
        fidelity.class_agreement(JUDGE, examples("ab", "ab"), examples("a", "a"))


def test_attributes_count_where_the_prompt_names_them():
    claims: list[Any] = [{"haze": "clear"}, {"haze": "hazy"}, {"haze": None, "side": "even"}, {"haze": "hazy"}]
    measured = [{"haze": haze, "side": "even"} for haze in ("clear", "clear", "hazy", "hazy")]
    figures = fidelity.attribute_agreement(claims, measured, claims[:2], measured[:2])
    haze, side, mean = (figures[f"attribute_agreement{name}"] for name in ("_haze", "_side", ""))
    assert value(haze) == pytest.approx(2 / 3) and (haze.n_generated, haze.n_real, haze.floor) == (3, 2, 0.5)
    assert haze.note == "chance agreement 0.444"  # clear: 1/3 of the claims, 2/3 of the images; hazy: the reverse
    assert value(side) == 1 and side.n_generated == 1 and side.floor is None
    assert value(mean) == pytest.approx(5 / 6) and mean.note == "mean of haze, side" and mean.floor is None
    assert fidelity.attribute_agreement([{"haze": None}], [{"haze": "hazy"}]) == {}
