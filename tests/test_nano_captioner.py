"""The bundled captioner: stock classes load it, it keeps the caption and class that it is asked for, it is small."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer, LlavaNextForConditionalGeneration

from llava_next_captioner import checks, prompts
from medart_core.attribute_phrases import PHRASES, domain_of, parse
from medart_core.attributes import VALUES, measure
from medart_core.images import open_image
from medart_core.text import clean

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "nano" / "llava-next"
sys.path.insert(0, str(ROOT / "nano"))
from captioner_text import describe, other_class, prompt, simple_caption  # noqa: E402  # pyright: ignore[reportMissingImports]

LABELS = ("normal lungs", "bacterial pneumonia", "viral pneumonia")


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(NANO)


@pytest.fixture(scope="module")
def model():
    return LlavaNextForConditionalGeneration.from_pretrained(NANO, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def t5():
    return AutoTokenizer.from_pretrained(ROOT / "nano" / "pixart" / "tokenizer")


def test_sizes_and_parts(model, processor):
    assert sum(file.stat().st_size for file in NANO.iterdir()) <= 8e6
    assert type(model.model.vision_tower).__name__ == "CLIPVisionModel"
    assert type(model.model.language_model).__name__ == "LlamaModel"
    assert len(model.config.image_grid_pinpoints) > 1  # crops of any resolution
    assert processor.tokenizer.padding_side == "left"
    card = json.loads((NANO / "card.json").read_text())
    assert set(card["domains"]) == {"chest-xray", "dermoscopy", "histology"} <= prompts.DOMAINS.keys()


@torch.no_grad()
def caption(model, processor, asked, **sampling) -> list[str]:
    """Captions of (image, domain, simple caption, class) by one batch."""
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompts.build(*request)}]}]
        for _, *request in asked
    ]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    inputs = processor(images=[image for image, *_ in asked], text=texts, padding=True, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=150, **(sampling or {"do_sample": False}))
    answers = out[:, inputs["input_ids"].shape[1] :]
    assert (answers == processor.tokenizer.eos_token_id).any(dim=1).all()  # each came to its end
    return [text.strip() for text in processor.batch_decode(answers, skip_special_tokens=True)]


def test_real_x_rays_get_captions_that_pass_the_checks(model, processor, t5, x_rays):
    """The class is the prompt's, whatever the image shows; the attributes are the image's."""
    files = sorted(x_rays.glob("*.jpeg"))[:6]
    images = [open_image(file) for file in files]
    asked = [(image, "chest-xray", f"A chest X-ray image of {label}", label)
             for number, image in enumerate(images) for label in (LABELS[number % 3],)]  # fmt: skip
    texts = caption(model, processor, asked)
    for text, (_, domain, simple, label) in zip(texts, asked, strict=True):
        faults = checks.check(
            text, finished=True, simple_caption=simple, label=label, labels=LABELS,
            features=prompts.DOMAINS[domain].features, count_tokens=lambda said: len(t5(clean(said)).input_ids),
        )  # fmt: skip
        assert faults == [], text
        assert None not in parse(domain, text).values(), text
    right = [parse("chest-xray", text)[name] == value for text, image in zip(texts, images, strict=True)
             for name, value in measure("chest-xray", image).items()]  # fmt: skip
    assert np.mean(right) >= 0.6  # about 0.4 by chance; these copies are shrunk


def test_other_domains_and_sampling(model, processor):
    tile = np.full((128, 128, 3), (215, 110, 150), np.uint8)
    tile[::16] = (70, 40, 100)
    from PIL import Image

    pink = Image.fromarray(tile)
    brown = Image.new("RGB", (64, 48), (120, 75, 40))
    asked = [
        (pink, "histology", "A histology image of H&E stained tissue", "H&E"),
        (brown, "dermoscopy", "A dermoscopic image of melanoma", "melanoma"),
    ]
    texts = caption(model, processor, asked)
    assert [text.startswith(simple) for text, (_, _, simple, _) in zip(texts, asked, strict=True)] == [True, True]
    assert parse("histology", texts[0])["stain"] == "H&E"
    assert parse("dermoscopy", texts[1])["colour"] == "dark brown"
    torch.manual_seed(0)
    assert len(set(caption(model, processor, asked[:1] * 6, do_sample=True, temperature=0.8))) > 1


@pytest.mark.parametrize("domain", VALUES)
def test_descriptions_say_what_was_measured_and_parse_reads_it(domain, t5):
    rng = np.random.default_rng(0)
    for _ in range(300):
        measured = {name: values[int(rng.integers(len(values)))] for name, values in VALUES[domain].items()}
        label = other_class(domain, rng)
        simple = simple_caption(domain, label, rng)
        text = describe(domain, simple, measured, rng)
        assert text.startswith(simple) and text.endswith(".") and parse(domain, text) == measured
        assert domain_of([simple, text]) == domain and domain_of([simple]) is None
        assert len(text.split()) <= 60 and len(t5(clean(text)).input_ids) <= 120
        assert simple in prompt(domain, simple, label, rng, bool(rng.random() < 0.5))


def test_wordings_are_told_apart():
    """No wording of a value lies within another value's, or `parse` would find both."""
    for attributes in PHRASES.values():
        for values in attributes.values():
            said = [(value, wording) for value, wordings in values.items() for wording in wordings.split("|")]
            clashes = [(a, b) for key, a in said for other, b in said if key != other and a in b]
            assert clashes == []
    assert parse("photograph", "It is rather dark and has bright lighting.") == {"exposure": None, "tone": None}


def test_the_record_is_of_these_weights():
    record = json.loads((ROOT / "nano" / "records" / "llava-next.json").read_text())
    for domain in json.loads((NANO / "card.json").read_text())["domains"]:
        assert record[domain]["attributes"].keys() == VALUES[domain].keys()
        for row in record[domain]["attributes"].values():
            assert row["reached"] == (row["sampled"] >= min(row["majority"] + 0.2, 0.9))
        assert record[domain]["most_t5_tokens"] <= 120 and record[domain]["class"]["kept"] >= 0.9
