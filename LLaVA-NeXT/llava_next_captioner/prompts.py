"""What the model is asked: one template, and for each kind of image the features to look for."""

import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PLACEHOLDERS = frozenset({"features", "label", "caption"})
TEMPLATE = (
    "You are looking at a medical picture whose caption is known to be right: {caption}. "
    "Its class is {label}; do not doubt it, and name no other class. "
    "Tell a painter who cannot see the picture what it shows. Go through these points as far as they are visible: "
    "{features}. Write one paragraph of short, plain sentences, fewer than 100 words in all, in the present tense. "
    'Its first words are exactly "{caption}", and the sentence runs on from there. '
    "Do not repeat the list of points, give no advice, and mention nothing that cannot be seen."
)


@dataclass(frozen=True)
class Domain:
    """A kind of image: the words in a simple caption that tell it, and the visual features worth describing."""

    words: tuple[str, ...]
    features: tuple[str, ...]


DOMAINS = {
    "endoscopy": Domain(
        ("endoscopic", "endoscopy", "colonoscopic", "colonoscopy", "gastroscopic", "gastroscopy"),
        (
            "main colours", "outline and size of the finding", "surface texture", "look of the mucosa around it",
            "visible vessels or bleeding", "light reflections", "instruments or dye",
        ),
    ),
    "dermoscopy": Domain(
        ("dermoscopic", "dermoscopy", "dermatoscopic", "dermatoscopy", "skin lesion"),
        (
            "colours and how evenly they are spread", "outline and symmetry", "sharpness of the border",
            "network, dots or streaks", "surrounding skin", "hairs, scale marks or air bubbles",
        ),
    ),
    "chest-xray": Domain(
        ("chest x ray", "chest xray", "chest radiograph", "chest radiography", "cxr"),
        (
            "brightness and contrast", "clear or hazy lung fields", "place and extent of opacities",
            "difference between left and right", "outline of heart and diaphragm", "ribs and shoulders",
            "tubes, wires or letter markers",
        ),
    ),
    "histology": Domain(
        (
            "histologic", "histological", "histology", "histopathological", "histopathology", "microscopic",
            "microscopy",
        ),
        (
            "stain colours", "density of the nuclei", "size and shape of the nuclei",
            "arrangement of glands or fibres", "empty spaces", "evenness of the tissue",
        ),
    ),
}  # fmt: skip


def words_of(text: str) -> list[str]:
    """The words of `text` in lower case; hyphens, underscores and all punctuation only separate them."""
    return re.findall(r"[^\W_]+", text.casefold())


def find_phrase(phrase: Sequence[str], words: Sequence[str]) -> bool:
    """Whether the words of `phrase` follow each other in `words`; an empty phrase is nowhere."""
    size = len(phrase)
    return size > 0 and any(list(words[i : i + size]) == list(phrase) for i in range(len(words) - size + 1))


def domain_of(caption: str) -> str | None:
    """The key in `DOMAINS` that a simple caption names, or None where it names none of them or several."""
    words = words_of(caption)
    found = [
        name for name, domain in DOMAINS.items() if any(find_phrase(words_of(word), words) for word in domain.words)
    ]
    return found[0] if len(found) == 1 else None


def labels_from_captions(captions: Iterable[str]) -> dict[str, str]:
    """The class of each simple caption of a data set without labels: what follows the words that all captions share.

    A class is never cut at a word such as "of"; where there is but one caption, all of it is the class.
    """
    distinct = {caption: caption.split() for caption in captions}
    shared = 0
    if len(distinct) > 1:
        for column in zip(*distinct.values(), strict=False):
            if len(set(column)) > 1:
                break
            shared += 1
        shared = min(shared, min(len(words) for words in distinct.values()) - 1)
    return {caption: " ".join(words[max(shared, 0) :]).rstrip(".") for caption, words in distinct.items()}


def check_template(template: str) -> str:
    """Return `template` as it is, or raise `ValueError` where a placeholder is missing, unknown or decorated."""
    try:
        fields = [(name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(template)]
    except ValueError as error:
        raise ValueError(
            f"the prompt template is not well formed ({error}): write literal braces as {{{{ }}}}"
        ) from None
    named = [(name, spec, conversion) for name, spec, conversion in fields if name is not None]
    known = ", ".join(f"{{{name}}}" for name in sorted(PLACEHOLDERS))
    for name, spec, conversion in named:
        if name not in PLACEHOLDERS or spec or conversion:
            shown = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ValueError(f"the prompt template has the placeholder {{{shown}}}: only {known} are known, plain")
    missing = sorted(PLACEHOLDERS - {name for name, _, _ in named})
    if missing:
        raise ValueError(f"the prompt template lacks {{{missing[0]}}}: it needs each of {known}")
    return template


def build(
    domain: str | None,
    simple_caption: str,
    label: str,
    features: Sequence[str] | None = None,
    template: str | None = None,
) -> str:
    """The prompt of one image; `features` and `template` replace those of its domain.

    Raises `ValueError` for a domain that is not in `DOMAINS` where no `features` are given, and for a bad template.
    """
    if not features:
        if domain not in DOMAINS:
            raise ValueError(f"no features are known for the domain {domain!r}: name one of {', '.join(DOMAINS)}, "
                             "or the features to describe")  # fmt: skip
        features = DOMAINS[domain].features
    template = TEMPLATE if template is None else check_template(template)
    caption = " ".join(simple_caption.split()).rstrip(".")
    return template.format(features=", ".join(features), label=" ".join(label.split()), caption=caption)
