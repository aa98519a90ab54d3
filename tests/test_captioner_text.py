"""The captioner's words: prompts, checks of what the model says, and shortening."""

import time

import pytest

from llava_next_captioner import checks, prompts
from llava_next_captioner.shortening import drop_sentences

KVASIR = [
    "dyed-lifted-polyps", "dyed-resection-margins", "esophagitis", "normal-cecum", "normal-pylorus", "normal-z-line",
    "polyps", "ulcerative-colitis",
]  # fmt: skip
XRAY = ["normal lungs", "bacterial pneumonia", "viral pneumonia"]
POLYPS = "An endoscopic image of dyed lifted polyps"


@pytest.mark.parametrize(
    ("caption", "domain"),
    [
        ("An endoscopic image of polyps", "endoscopy"),
        ("A dermoscopic image patch, dark brown", "dermoscopy"),
        ("A chest X-ray image of normal lungs", "chest-xray"),
        ("a CHEST x ray of pneumonia", "chest-xray"),
        ("A histology image of tumour", "histology"),
        ("A photo of a flower", None),
        ("An X-ray image of a hand", None),
        ("A histology image of a biopsy taken by endoscopy", None),
    ],
)
def test_domain_of_a_simple_caption(caption: str, domain: str | None) -> None:
    assert prompts.domain_of(caption) == domain


def test_prompts_hold_caption_class_and_features() -> None:
    for name, domain in prompts.DOMAINS.items():
        prompt = prompts.build(name, "An image of  {label}\n of things.", "{odd} class")
        assert '"An image of {label} of things"' in prompt and "{odd} class" in prompt
        assert all(feature in prompt for feature in domain.features)
    assert prompts.build(None, "A b", "c", ["hue"], "{caption}|{label}|{features}|{{x}}") == "A b|c|hue|{x}"
    with pytest.raises(ValueError, match="name one of endoscopy"):
        prompts.build("mri", "An MRI image of a brain", "brain")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{caption} {label}", "lacks {features}"),
        ("{caption} {label} {features} {colour}", "{colour}"),
        ("{caption} {label} {features} {}", "{}"),
        ("{caption} {label.__class__} {features}", "{label.__class__}"),
        ("{caption!r} {label} {features}", "{caption!r}"),
        ("{caption:>99} {label} {features}", "{caption:>99}"),
        ("{caption} {label} {features} {", "write literal braces"),
    ],
)
def test_bad_templates_are_refused(template: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        prompts.build("endoscopy", "An endoscopic image of polyps", "polyps", template=template)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_classes_from_captions_alone() -> None:
    captions = ["An image of loss of colour.", "An image of polyps", "An image of dyed lifted polyps"]
    assert list(prompts.labels_from_captions(captions).values()) == ["loss of colour", "polyps", "dyed lifted polyps"]
    assert prompts.labels_from_captions(["A b c", "A b"]) == {"A b c": "b c", "A b": "b"}
    assert prompts.labels_from_captions(["One of a kind"]) == {"One of a kind": "One of a kind"}


def faults(
    text: str, label: str = "dyed-lifted-polyps", caption: str = POLYPS, labels=KVASIR, **settings
) -> list[str]:
    """The failed checks of an answer that was not cut off; a token is four letters."""
    named = {"finished": True, "features": ["colour", "shape", "surface texture", "bleeding"]} | settings
    return checks.check(
        text, simple_caption=caption, label=label, labels=labels, count_tokens=lambda said: len(said) // 4, **named
    )


@pytest.mark.parametrize(
    ("rest", "failed"),
    [
        (", mostly blue. The mucosa around them is pink!", []),
        (' with 2.5 mm margins. They look "wet."', []),
        (" is blue", ["unfinished"]),
        (". They are blue", ["unfinished"]),
        ("-like tissue.", []),
        ("es.", ["begins_with_caption", "wrong_class"]),
        (" of a specific color, shape, surface texture and bleeding.", ["echoes_features"]),
        (" with its shape, the surface texture, and any bleeding visible.", ["echoes_features"]),
        (" of round shape and wet surface texture.", []),
        (" which is blue." + " The pink wall is dry." * 2, ["loops"]),
        (" very very very wet.", ["loops"]),
        (" red and white red and white.", ["loops"]),
        (" side by side, again and again.", []),
        (" in a b c d e f, g a b c d e f, h a b c d e f.", ["loops"]),
        (" " + " ".join(f"w{i}" for i in range(93)) + ".", []),
        (" " + " ".join(f"w{i}" for i in range(94)) + ".", ["too_many_words"]),
        (" " + "x" * 436 + ".", []),
        (" " + "x" * 445 + ".", ["too_many_tokens"]),
    ],
)
def test_checks(rest: str, failed: list[str]) -> None:
    assert faults(POLYPS + rest) == failed


def test_beginning_and_end() -> None:
    assert faults("\n an ENDOSCOPIC  image of\tdyed lifted polyps. Blue.", caption=POLYPS + ".") == []
    assert faults("Sure! " + POLYPS + ".") == ["begins_with_caption"]
    assert faults(POLYPS + ".", finished=False) == ["unfinished"]
    begun = time.monotonic()
    assert "unfinished" in faults(POLYPS + "." * 50_000 + "x") and time.monotonic() - begun < 10  # not quadratic
    assert faults("") == ["begins_with_caption", "wrong_class", "unfinished"]


@pytest.mark.parametrize(
    ("label", "labels", "text", "wrong"),
    [
        # A class inside the own one's phrase is not another one; one around it is.
        ("dyed-lifted-polyps", KVASIR, "The dyed lifted polyps: polyps are raised, one polyp is big.", False),
        ("polyps", KVASIR, "Two polyps, really dyed lifted polyps.", True),
        ("polyps", KVASIR, "A single polyp beside a dyed area that is lifted.", False),
        # Plural, hyphens, underscores and case.
        ("normal-z-line", KVASIR, "A NORMAL Z Line of the esophagus.", False),
        ("normal_cecum", KVASIR, "A normal cecum, unlike a Normal Pylorus.", True),
        ("normal-z-line", KVASIR, "A normal z-line with ulcerative-colitis.", True),
        ("normal-z-line", KVASIR, "A normal line.", True),  # its own class is not named
        ("esophagitis", KVASIR, "Esophagitis above the z-line, with normal mucosa.", False),
        ("bacterial pneumonia", XRAY, "Bacterial pneumonia; heart of normal size, left lung normal.", False),
        ("bacterial pneumonia", XRAY, "Bacterial pneumonia below a normal lung.", True),
        ("bacterial pneumonia", ["normal", "bacterial pneumonia"], "Bacterial pneumonia, normal heart size.", False),
        ("normal", ["normal", "pneumonia"], "A normal heart.", False),
        ("normal", ["normal", "pneumonia"], "A normal heart, no pneumonia.", True),  # to deny is to name
        ("pneumonia", ["pneumonia", "viral pneumonia"], "A viral pneumonia.", True),
        ("viral pneumonia", ["pneumonia", "viral pneumonia"], "Viral pneumonia; the pneumonia is mild.", False),
        (
            "dark brown",
            ["dark brown", "light brown", "red-pink"],
            "Dark brown with a light brown, red pink rim.",
            False,
        ),
        ("nevus", ["nevus", "naevi", "seborrheic keratosis"], "Two nevi, which look like the naevus.", False),
        ("nevus", ["nevus", "naevi", "seborrheic keratosis"], "A nevus, unlike seborrheic keratoses.", True),
        ("polyp", ["polyp", "polyps"], "A polyp among polyps.", False),
    ],
)
def test_classes(label: str, labels: list[str], text: str, wrong: bool) -> None:
    assert checks.wrong_class(text, f"An image of {label}", label, labels) is wrong


def test_a_code_need_not_be_named() -> None:
    codes = ["MEL", "NV"]
    assert not checks.wrong_class("A dermoscopic image of a nevus.", "A dermoscopic image of a nevus", "NV", codes)
    assert checks.wrong_class("A nevus or mel.", "A dermoscopic image of a nevus", "NV", codes)


def test_sentences_are_dropped_from_the_end() -> None:
    text = 'One is 2.5 mm wide, approx. 3 mm high. "Two!" Three?\nFour is last.'
    assert [part.strip() for part in checks.sentences(text)] == [
        "One is 2.5 mm wide, approx. 3 mm high.", '"Two!"', "Three?", "Four is last.",
    ]  # fmt: skip
    assert "".join(checks.sentences(text)) == text
    assert drop_sentences(text, lambda said: len(said) < 55) == text[: text.index("\n")]
    assert drop_sentences(text, lambda said: True) == text
    assert drop_sentences(text, lambda said: len(said) < 9) is None
