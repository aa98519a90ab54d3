"""What the bundled captioner's training looks at: images cut into crops, prompts with answers, attribute heads."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from captioner_images import Sample, training_samples
from captioner_text import describe, other_class, prompt, simple_caption
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from medart_core.attributes import VALUES

OTHER_CLASS = 0.5  # share of samples whose prompt names another class than the image's, which the answer then follows
STOCK_PROMPT = 0.25  # share of the batches with the long prompt that VSG.py uses; the others are short and varied


class Crops(NamedTuple):
    """The crops of one image (N, 3, side, side) uint8, its height and width, and what is known of it."""

    pixels: torch.Tensor
    size: tuple[int, int]
    sample: Sample


def load_pool(processor: Any) -> dict[str, list[Crops]]:
    """All training images by domain, cut by the stock processor."""
    pool: dict[str, list[Crops]] = {domain: [] for domain in VALUES}
    for sample in tqdm(training_samples(), "images", mininterval=10):
        cut = processor.image_processor(sample.image, return_tensors="pt")["pixel_values"][0]
        pixels = (cut * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        size = (sample.image.height, sample.image.width)
        pool[sample.domain].append(Crops(pixels, size, sample._replace(image=None)))  # pyright: ignore[reportArgumentType]
    print("training images", {domain: len(crops) for domain, crops in pool.items()}, flush=True)
    return pool


def draw(pool: dict[str, list[Crops]], domain: str, count: int, rng: np.random.Generator) -> list[Crops]:
    return [pool[domain][i] for i in rng.integers(len(pool[domain]), size=count)]


def pixel_values(crops: list[Crops]) -> torch.Tensor:
    """(B, N, 3, side, side) in [-1, 1], with zeros for the crops that an image lacks."""
    return pad_sequence([crop.pixels.float() / 127.5 - 1 for crop in crops], batch_first=True)


class Attributes(nn.Module):
    """Linear heads on the tower's mean tokens of the base image and of its crops, one for each attribute."""

    def __init__(self, width: int) -> None:
        super().__init__()
        heads = {f"{d}/{name}": nn.Linear(2 * width, len(v)) for d in VALUES for name, v in VALUES[d].items()}
        self.heads = nn.ModuleDict(heads)

    def forward(self, tower: Any, crops: list[Crops], domain: str) -> torch.Tensor:
        """Mean cross-entropy over the attributes of a batch of one domain."""
        counts = [len(crop.pixels) for crop in crops]
        tokens = tower(torch.cat([crop.pixels for crop in crops]).float() / 127.5 - 1).last_hidden_state[:, 1:]
        means = tokens.mean(dim=1).split(counts)
        features = torch.stack([torch.cat([mean[0], mean[1:].mean(dim=0)]) for mean in means])
        losses = []
        for name, values in VALUES[domain].items():
            truth = torch.tensor([values.index(crop.sample.measured[name]) for crop in crops])
            losses.append(F.cross_entropy(self.heads[f"{domain}/{name}"](features).float(), truth))
        return torch.stack(losses).mean()


def caption_batch(processor: Any, crops: list[Crops], rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Prompts and answers of one domain, padded on the right; the loss is on the answers alone."""
    tokenizer, rows, labels = processor.tokenizer, [], []
    stock = rng.random() < STOCK_PROMPT
    counts = processor._get_num_multimodal_tokens([crop.size for crop in crops])["num_image_tokens"]
    for crop, count in zip(crops, counts, strict=True):
        domain, _, label, measured = crop.sample
        asked = simple_label(domain, label, rng)
        caption = simple_caption(domain, asked, rng)
        text = [{"type": "image"}, {"type": "text", "text": prompt(domain, caption, asked, rng, stock)}]
        question = processor.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        question = question.replace(processor.image_token, processor.image_token * count)
        answer = describe(domain, caption, measured, rng) + tokenizer.eos_token
        before, after = (tokenizer(part, add_special_tokens=False).input_ids for part in (question, answer))
        rows.append(torch.tensor(before + after))
        labels.append(torch.tensor([-100] * len(before) + after))
    ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    return {
        "input_ids": ids,
        "attention_mask": (ids != tokenizer.pad_token_id).long(),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "pixel_values": pixel_values(crops),
        "image_sizes": torch.tensor([crop.size for crop in crops]),
    }


def simple_label(domain: str, label: str, rng: np.random.Generator) -> str:
    """The class that the prompt names: the image's own, or another one that the answer must follow."""
    return other_class(domain, rng) if rng.random() < OTHER_CLASS else label
