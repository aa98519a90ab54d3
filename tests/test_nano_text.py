"""The bundled tokenizer and T5: conventions of the published one, word knowledge, and the grammar they learnt from."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, T5EncoderModel, T5Tokenizer

from medart_core.text import MAX_TOKENS, clean, encode_prompts

NANO = Path(__file__).resolve().parents[1] / "nano"
sys.path.insert(0, str(NANO))
from captions import PHOTO_CLASSES, photo_caption, scene  # noqa: E402  # pyright: ignore[reportMissingImports]
from medical_captions import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    DOMAINS,
    MAX_WORDS,
    description,
    simple_caption,
)

# In words of its own, so that the count is not flattered by the grammar that made the tokenizer.
HAND_WRITTEN = (
    "A chest X-ray image of viral pneumonia. Both lungs show a hazy veil that is stronger towards the hilum, with "
    "fine streaks reaching the outer thirds. The outline of the heart can still be followed on either side.",
    "A chest X-ray image of normal lungs. The lung fields are dark and even, the ribs stand out as pale bands, and "
    "the diaphragm is a smooth dome with sharp corners. The picture is slightly rotated.",
    "An endoscopic image of dyed lifted polyps, which look blue-green with a lighter rim. The polyp is round, rests "
    "on a raised cushion, and its wet surface reflects the lamp. No blood is seen.",
    "A dermoscopy image of melanoma. The patch is large and uneven, dark brown to black with a bluish centre and a "
    "ragged edge. Small dots gather on one side, and a few hairs cross it.",
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(NANO / "pixart" / "tokenizer")


@pytest.fixture(scope="module")
def text_encoder():
    return T5EncoderModel.from_pretrained(NANO / "pixart" / "text_encoder", dtype=torch.float32).eval()


def tokens_per_word(tokenizer, texts) -> float:
    texts = [clean(text) for text in texts]
    return sum(len(ids) - 1 for ids in tokenizer(texts).input_ids) / sum(len(text.split()) for text in texts)


@torch.no_grad()
def similarities(tokenizer, text_encoder, texts) -> torch.Tensor:
    """Cosines (N, N) between the means of the texts' tokens, the end token left out."""
    embeds, mask = encode_prompts(tokenizer, text_encoder, texts)
    words = (mask.cumsum(dim=1) < mask.sum(dim=1, keepdim=True)).float()[..., None]
    pooled = F.normalize((embeds * words).sum(dim=1), dim=1)
    return pooled @ pooled.T


def test_tokenizer_follows_t5(tokenizer):
    assert isinstance(tokenizer, T5Tokenizer)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer("").input_ids == [1]
    ids = tokenizer("a photo of a horse").input_ids
    assert ids[-1] == 1 and tokenizer.decode(ids, skip_special_tokens=True) == "a photo of a horse"
    assert not any("extra_id" in piece for piece in tokenizer.get_vocab())
    explicit = T5Tokenizer.from_pretrained(NANO / "pixart" / "tokenizer")
    assert explicit("a chest x-ray image").input_ids == tokenizer("a chest x-ray image").input_ids


def test_truncation_keeps_the_end_token(tokenizer):
    # The call of the stock pipeline, with more words than fit.
    tokens = tokenizer(
        "lung " * 300, padding="max_length", max_length=MAX_TOKENS, truncation=True, add_special_tokens=True
    )
    assert len(tokens.input_ids) == MAX_TOKENS and tokens.input_ids[-1] == 1


def test_descriptions_take_few_tokens(tokenizer):
    held_out = [description(np.random.default_rng([7, index])) for index in range(200)]
    assert tokens_per_word(tokenizer, held_out) <= 1.4
    assert tokens_per_word(tokenizer, HAND_WRITTEN) <= 1.6
    lengths = [len(ids) for ids in tokenizer([clean(text) for text in held_out]).input_ids]
    assert sum(length <= MAX_TOKENS for length in lengths) >= 0.99 * len(lengths)  # a hundred words fit


def test_unknown_characters_and_words(tokenizer, text_encoder):
    for text in ("ünknöwn 漢字 🫁", "\u200b", "a\tb\nc", "zyzzyva qwxk", "~`@#$%^&*()_+={}[]|\\:;\"'<>,.?/0123456789"):
        embeds, _ = encode_prompts(tokenizer, text_encoder, [text])
        assert torch.isfinite(embeds).all()
    assert 2 in tokenizer("漢字").input_ids
    printable = "".join(chr(code) for code in range(33, 127) if not chr(code).isupper())
    assert 2 not in tokenizer(" ".join(printable)).input_ids  # every ASCII character is a piece


def test_encoder_is_a_small_gated_t5_in_float32(tokenizer, text_encoder):
    assert all(parameter.dtype == torch.float32 for parameter in text_encoder.parameters())
    assert T5EncoderModel.from_pretrained(NANO / "pixart" / "text_encoder").dtype == torch.float32
    names = {name.rsplit(".", 1)[-1] for name, _ in text_encoder.named_modules()}
    assert {"q", "k", "v", "o", "wi_0", "wi_1", "wo"} <= names and "wi" not in names
    assert text_encoder.config.vocab_size == len(tokenizer)
    parameters = sum(parameter.numel() for parameter in text_encoder.parameters())
    assert parameters <= 1_500_000
    assert parameters == json.loads((NANO / "records" / "text.json").read_text())["parameters"]


@torch.no_grad()
def test_padding_changes_nothing(tokenizer, text_encoder):
    captions = [clean(text) for text in (HAND_WRITTEN[0], "a photo of a frog", "")]
    embeds, mask = encode_prompts(tokenizer, text_encoder, captions)
    full = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    reference = text_encoder(full.input_ids, attention_mask=full.attention_mask)[0][:, : mask.shape[1]]
    assert mask.shape[1] < MAX_TOKENS
    torch.testing.assert_close(embeds[mask.bool()], reference[mask.bool()], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("word", "near", "far"),
    [
        ("ship", "boat", "frog"),
        ("horse", "pony", "lungs"),
        ("airplane", "jet", "flower"),
        ("flower", "blossom", "car"),
        ("dog", "puppy", "ship"),
        ("rib", "ribs", "flower"),
    ],
)
def test_words_of_like_meaning_are_neighbours(tokenizer, text_encoder, word, near, far):
    cosines = similarities(tokenizer, text_encoder, [word, near, far])[0]
    assert cosines[1] > cosines[2] + 0.05


def test_captions_of_like_meaning_are_neighbours(tokenizer, text_encoder):
    photographs = ["a photo of a ship", "a photo of a boat", "a photo of a flower"]
    chests = ["a chest x-ray image of bacterial pneumonia", "a chest x-ray image of viral pneumonia"]
    cosines = similarities(tokenizer, text_encoder, [*photographs, *chests, "a chest x-ray image of normal lungs"])
    assert cosines[0, 1] > cosines[0, 2] + 0.02  # a boat rather than a flower
    assert cosines[:3, 3:].max() < cosines[3:, 3:].min() - 0.1  # photographs and X-rays apart
    assert cosines[3, 4] > cosines[3, 5] + 0.02  # the two pneumonias rather than healthy lungs


def test_a_lone_spiece_model_loads(tmp_path):
    """The published tokenizer ships nothing but spiece.model, which takes sentencepiece and protobuf to read."""
    import sentencepiece

    rng = np.random.default_rng(0)
    (tmp_path / "corpus.txt").write_text("\n".join(clean(description(rng)) for _ in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "spiece"), vocab_size=400,
        model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (tmp_path / "spiece.model").rename(folder / "spiece.model")
    loaded = T5Tokenizer.from_pretrained(folder)
    text = "a chest x-ray image of normal lungs"
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    assert loaded(text).input_ids == [*model.encode(text), 1]
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2)


def test_photo_captions_claim_only_the_class():
    drawn = [photo_caption(label, np.random.default_rng([3, i])) for i in range(60) for label in PHOTO_CLASSES]
    assert len(set(drawn)) >= 10 * len(PHOTO_CLASSES)
    allowed = {"a", "an", "photo", "photograph", "picture", "image", "of", "small", "natural", "colour", "showing"}
    allowed |= {"this", "shows", "is", "with", "in", "it"}
    for text in drawn:
        assert len(set(text.split()) - allowed) == 1, text
    assert "a photo of an airplane" in drawn and "a photo of a horse" in drawn


def test_descriptions_begin_with_the_simple_caption_and_are_short():
    for domain in DOMAINS:
        texts = [description(np.random.default_rng([5, i]), domain) for i in range(100)]
        assert len(set(texts)) > 95
        assert all(15 <= len(text.split()) <= MAX_WORDS for text in texts)
        assert not any(mark in text for text in texts for mark in "{}|")
        assert all(" image of " in " ".join(text.split()[:7]) for text in texts)


def test_grammar_is_deterministic_and_rich():
    for draw in (scene, simple_caption, description):
        assert draw(np.random.default_rng(4)) == draw(np.random.default_rng(4))
    rng = np.random.default_rng(0)
    assert len({scene(rng) for _ in range(2000)}) > 1500
    assert len({description(rng) for _ in range(1000)}) == 1000
    healthy = " ".join(description(rng, "healthy chest") for _ in range(200)).lower()
    assert "pneumonia" not in healthy and "dense" not in healthy
