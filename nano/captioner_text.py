"""What the bundled captioner learns to say: descriptions of measured attributes, and the prompts that ask for them.

A description begins with the simple caption and names every attribute of its domain once, in one of several wordings
of `medart_core/attribute_phrases.py`.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from captions import PHOTO_CLASSES, expand, photo_caption
from medical_captions import DOMAINS as GRAMMAR

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from llava_next_captioner import prompts
from medart_core.attribute_phrases import PHRASES

SENTENCES = {
    "chest-xray": "{link} {image|film|radiograph} {exposure}, {contrast}. {haze}, and {side}. {marker}.",
    "dermoscopy": "{link} {area|skin|surface} {colour}, {variegation}. {border}.",
    "histology": "{link} {tissue|sample|section} {stain}. {nuclei}, and {space}.",
    "photograph": "{link} {picture|image} {exposure}. {tone}.",
}
LINK = ("{. The|. The| in which the|, where the}",)  # a prompt may ask for a first sentence that runs on

# --- Simple captions ---

OPENINGS = {  # those of prepare.py twice
    "chest-xray": "A chest X-ray image of {}|A chest X-ray image of {}|A chest radiograph of {}|A chest X-ray of {}|"
    "A chest radiograph showing {}|Chest X-ray, {}",
    "dermoscopy": "A dermoscopic image patch, {}|A dermoscopic image patch, {}|A dermoscopic image of {}|"
    "A dermoscopy image of {}|A skin lesion image of {}|A dermoscopic image showing {}",
    "histology": "A histology image of {} stained tissue|A histology image of {} stained tissue|"
    "A histology image of {}|A histopathology image of {}|A microscopic image of {}|A histology image showing {}",
}
MEASURED_CLASSES = {  # of medical_captions: what they say of the pixels could be false
    "a light brown lesion", "a dark brown lesion", "a black lesion", "a blue-gray lesion", "a red lesion",
    "a white lesion", "stained tissue",
}  # fmt: skip
FEATURES = {name: domain.features for name, domain in prompts.DOMAINS.items()} | {
    "photograph": ("main colours", "light and shadow", "what stands in front", "background")
}
MORE_FEATURES = (
    "colour", "shape", "texture", "size", "brightness", "contrast", "symmetry", "sharp or soft edges", "dark areas",
    "bright areas", "density", "surroundings", "any writing", "stain", "haze", "background", "other visible details",
)  # fmt: skip
# Words for made-up classes, so that classes are copied and not guessed.
_CLASS_WORDS = "{red|blue|old|new|left|small|large|type two|early|late|acute|benign|healthy|rare|common|mixed|severe}"
_CLASS_NOUNS = (
    "{lesion|tissue|finding|disease|cells|skin|lungs|infection|tumor|cyst|sample|organ|nodule|fracture|gland|stroma|"
    "pneumonia|melanoma|nevus|fibrosis|edema|effusion|scar|wart|ulcer|polyp}"
)


def other_class(domain: str, rng: np.random.Generator) -> str:
    """A class that says nothing about the pixels: of our grammar, or words put together, so that copying is learnt."""
    if domain == "photograph":
        return PHOTO_CLASSES[int(rng.integers(len(PHOTO_CLASSES)))]
    if rng.random() < 0.5:
        return expand(f"{_CLASS_WORDS} {_CLASS_NOUNS}", rng, {})
    name = {"chest-xray": "chest"}.get(domain, domain)
    classes = [*GRAMMAR[name].classes, *(GRAMMAR["healthy chest"].classes if name == "chest" else ())]
    plain = [text for text in classes if text not in MEASURED_CLASSES]
    return plain[int(rng.integers(len(plain)))]


def simple_caption(domain: str, label: str, rng: np.random.Generator) -> str:
    """A simple caption that names `label`, in one of several wordings."""
    if domain == "photograph":
        text = photo_caption(label, rng)
        return text[0].upper() + text[1:]
    openings = OPENINGS[domain].split("|")
    return openings[int(rng.integers(len(openings)))].format(label)


# --- Prompts ---

_ASKS = (
    "This picture belongs to the class [label].|The image shows [label].|Class: [label].|You see an image of the "
    "class [label].|Look at this picture of [label].|Its class is [label].|",
    "Describe [features].|Describe what can be seen: [features].|Go through [features] as far as they are visible.|"
    "Write about these features: [features].|Tell what the image looks like through [features].|Describe the image.|"
    "Pay attention to [features].",
    "Begin with: [caption].|Start with the words \"[caption]\".|The description begins with \"[caption]\".|The "
    "first words are exactly \"[caption]\".|Begin your answer with [caption].|Its simple caption is [caption]; begin "
    "with it.",
    "Use at most 100 words.|Stay under 100 words.|Keep it short.|Write fewer than 100 words in plain sentences.|Do "
    "not repeat the list.|",
)  # fmt: skip


def _features(domain: str, rng: np.random.Generator) -> list[str]:
    own, others = list(FEATURES[domain]), list(MORE_FEATURES)
    chosen = [own[i] for i in rng.permutation(len(own))[: int(rng.integers(2, len(own) + 1))]]
    return chosen + [others[i] for i in rng.permutation(len(others))[: int(rng.integers(0, 3))]]


def prompt(domain: str, caption: str, label: str, rng: np.random.Generator, stock: bool = True) -> str:
    """A request for a description: the `stock` one of llava_next_captioner, or one of other wordings."""
    if stock:
        features = None if rng.random() < 0.7 and domain in prompts.DOMAINS else _features(domain, rng)
        return prompts.build(domain, caption, label, features)
    parts = [options.split("|") for options in _ASKS]
    chosen = [options[int(rng.integers(len(options)))] for options in parts]
    if rng.random() < 0.3:
        chosen = [chosen[i] for i in rng.permutation(len(chosen))]
    text = " ".join(part for part in chosen if part)
    text = text.replace("[features]", ", ".join(_features(domain, rng)))
    return text.replace("[caption]", caption).replace("[label]", label)


# --- Descriptions ---


def describe(domain: str, caption: str, measured: Mapping[str, str], rng: np.random.Generator) -> str:
    """The description that begins with `caption` and tells every measured attribute, about 40 words."""
    rules = {name: ("{" + PHRASES[domain][name][value] + "}",) for name, value in measured.items()}
    text = expand(SENTENCES[domain], rng, rules | {"link": LINK})
    text = caption.rstrip(".") + ("" if text[0] in ".," else " ") + text
    return text
