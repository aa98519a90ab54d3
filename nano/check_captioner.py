"""Hold the bundled captioner's captions of held-out images against what is measured on their pixels.

    python nano/check_captioner.py

Prints, and writes to nano/records/llava-next.json, for every attribute the share of captions that tell it rightly,
greedy and as VSG.py samples, beside the share of its most frequent value; then whether captions keep the class that
the prompt names, and the checks of llava_next_captioner. For patches and tiles, whose classes are measured as well,
the prompts of the attributes name no colour and no stain.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from captioner_images import prepared
from PIL import Image
from tqdm import tqdm
from transformers import AutoTokenizer, LlavaNextForConditionalGeneration, LlavaNextProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from llava_next_captioner import checks, prompts
from medart_core.attribute_phrases import parse
from medart_core.attributes import VALUES, Measured, measure
from medart_core.errors import exit_codes
from medart_core.options import Parser
from medart_core.packaged_sets import PATCH_CAPTION, TILE_CAPTION, XRAY_CAPTION
from medart_core.text import clean

HERE = Path(__file__).resolve().parent
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.9}
BATCH, MAX_NEW_TOKENS = 32, 150


class Held(NamedTuple):
    """A held-out image, its class, and what was measured on it."""

    image: Image.Image
    label: str
    measured: Measured


class Plan(NamedTuple):
    """How a domain is checked: splits, simple caption, and a class that does not give the measured ones away."""

    splits: tuple[str, ...]
    caption: str
    hidden: tuple[str, str] | None


PLANS = {
    "chest-xray": Plan(("val",), XRAY_CAPTION, None),
    "dermoscopy": Plan(("val",), PATCH_CAPTION, ("A dermoscopic image of a skin lesion", "skin lesion")),
    # Few tiles: the test split, never trained on either, is taken as well.
    "histology": Plan(("val", "test"), TILE_CAPTION, ("A histology image of tissue", "tissue")),
}


@torch.no_grad()
def captions(
    model: Any, processor: Any, images: list[Image.Image], questions: list[str], **sampling
) -> list[tuple[str, bool]]:
    """The caption of each image, and whether it came to its end."""
    found = []
    for start in tqdm(range(0, len(images), BATCH), "captions", mininterval=10):
        texts = []
        for question in questions[start : start + BATCH]:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            chat = [{"role": "user", "content": content}]
            texts.append(processor.apply_chat_template(chat, add_generation_prompt=True))
        inputs = processor(images=images[start : start + BATCH], text=texts, padding=True, return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        out = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, **(sampling or {"do_sample": False}))
        out = out[:, inputs["input_ids"].shape[1] :]
        ended = (out == processor.tokenizer.eos_token_id).any(dim=1).tolist()
        found += zip(processor.batch_decode(out, skip_special_tokens=True), ended, strict=True)
    return [(text.strip(), end) for text, end in found]


def agreement(domain: str, held: list[Held], texts: list[str]) -> dict[str, float]:
    """Share of captions that tell each attribute as it was measured; a caption that does not tell it is wrong."""
    said = [parse(domain, text) for text in texts]
    return {
        name: float(np.mean([claims[name] == item.measured[name] for claims, item in zip(said, held, strict=True)]))
        for name in VALUES[domain]
    }


def kept_class(texts: list[str], asked: list[tuple[str, str]], labels: list[str]) -> float:
    """Share of captions that begin with the simple caption asked for and name its class and no other."""
    return float(np.mean([
        checks.begins_with_caption(text, caption) and not checks.wrong_class(text, caption, label, labels)
        for text, (caption, label) in zip(texts, asked, strict=True)
    ]))  # fmt: skip


def table(domain: str, held: list[Held], greedy: list[str], sampled: list[str]) -> dict[str, dict[str, Any]]:
    rows = {}
    right, drawn = agreement(domain, held, greedy), agreement(domain, held, sampled)
    for name in VALUES[domain]:
        majority = Counter(item.measured[name] for item in held).most_common(1)[0][1] / len(held)
        shares = {"majority": majority, "greedy": right[name], "sampled": drawn[name]}
        rows[name] = {key: round(share, 3) for key, share in shares.items()}
        rows[name]["reached"] = drawn[name] >= min(majority + 0.2, 0.9)
    return rows


def check_domain(model: Any, processor: Any, domain: str, limit: int, count: Callable[[str], int]) -> dict[str, Any]:
    """All figures of one domain."""
    plan = PLANS[domain]
    pictures = [pair for split in plan.splits for pair in prepared(domain, split)]
    if limit:
        pictures = [pictures[i] for i in np.random.default_rng(0).permutation(len(pictures))[:limit]]
    held = [Held(image, label, measure(domain, image)) for image, label in pictures]
    images, labels = [item.image for item in held], sorted({item.label for item in held})
    own = [(plan.caption.format(label=item.label), item.label) for item in held]
    following = [labels[(labels.index(label) + 1) % len(labels)] for _, label in own]  # another class of the set
    swapped = [(plan.caption.format(label=label), label) for label in following]

    def ask(asked: list[tuple[str, str]], **sampling) -> list[tuple[str, bool]]:
        questions = [prompts.build(domain, caption, label) for caption, label in asked]
        return captions(model, processor, images, questions, **sampling)

    hidden = [plan.hidden] * len(held) if plan.hidden else own
    drawn_own = ask(own, **SAMPLING)
    greedy = [text for text, _ in ask(hidden)]
    sampled = [text for text, _ in (ask(hidden, **SAMPLING) if plan.hidden else drawn_own)]
    texts = [text for text, _ in drawn_own]
    features = prompts.DOMAINS[domain].features
    faults = Counter(
        fault
        for (text, finished), (caption, label) in zip(drawn_own, own, strict=True)
        for fault in checks.check(text, finished=finished, simple_caption=caption, label=label, labels=labels,
                                  features=features, count_tokens=count)
    )  # fmt: skip
    return {
        "images": len(held),
        "splits": list(plan.splits),
        "attributes": table(domain, held, greedy, sampled),
        "class": {
            "majority": round(max(Counter(label for _, label in own).values()) / len(held), 3),
            "kept": round(kept_class(texts, own, labels), 3),
            "kept_when_another_is_asked": round(kept_class([t for t, _ in ask(swapped)], swapped, labels), 3),
        },
        "faults": dict(faults),
        "distinct_captions": len(set(texts)),
        "most_words": max(len(text.split()) for text in texts),
        "most_t5_tokens": max(count(text) for text in texts),
        "example": texts[0],
    }


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE / "llava-next", help="folder of the model")
    parser.add_argument("--limit", type=int, default=0, help="images per domain, drawn at random (default: all)")
    parser.add_argument("--out", type=Path, default=HERE / "records" / "llava-next.json", help="where the record goes")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32).eval()
    processor = LlavaNextProcessor.from_pretrained(options.model)
    t5 = AutoTokenizer.from_pretrained(HERE / "pixart" / "tokenizer")

    def count(text: str) -> int:
        return len(t5(clean(text)).input_ids)

    record: dict[str, Any] = {"dtype": "float32", "sampling": SAMPLING}
    for domain in PLANS:
        record[domain] = check_domain(model, processor, domain, options.limit, count)
        print(f"\n{domain}, {record[domain]['images']} held-out images: {record[domain]['example']}")
        for name, row in record[domain]["attributes"].items():
            shares = "  ".join(f"{key} {row[key]:6.1%}" for key in ("majority", "greedy", "sampled"))
            print(f"  {name:12} {shares}  {'reached' if row['reached'] else 'MISSED'}")
        print(f"  class {record[domain]['class']}  faults {record[domain]['faults']}", flush=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    with exit_codes():
        main()
