"""Embeddings from the cache are T5's own, whatever the company, and T5 is gone."""

import contextlib
import gc
import weakref

import pytest
import torch

from medart_core import lora_layers, pretrained, text_cache
from medart_core.errors import UserError
from medart_core.sampling import sample_images
from medart_core.text import encode_prompts, encode_with_negative

CAPTIONS = [
    f"A chest X-ray image of {kind}" for kind in ("normal lungs", "viral pneumonia, dense and hazy", "x " * 90)
]


@pytest.fixture
def model(tiny_pixart):
    return pretrained.load(tiny_pixart, torch.float32, torch.device("cpu"))


def cache(model, captions, length=120):
    return text_cache.cache_embeddings(model, captions, length, contextlib.nullcontext(), False)


def test_cached_embeddings_are_those_of_direct_encoding(model):
    cached = cache(model, CAPTIONS, length=40)
    for captions in (CAPTIONS, CAPTIONS[:1], ["", CAPTIONS[1].upper() + " "]):
        expected, mask = encode_prompts(model.tokenizer, model.text_encoder, captions, 40)
        embeds, cached_mask = encode_prompts(model.tokenizer, cached, captions, 40)
        assert torch.equal(mask, cached_mask) and embeds.shape == expected.shape
        assert embeds.dtype == expected.dtype and not embeds.requires_grad
        torch.testing.assert_close(embeds[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)
        assert not embeds[~mask.bool()].any()


def test_an_embedding_has_the_same_bits_whatever_was_encoded_with_it(model):
    many = [f"{caption} {number}" for number in range(4) for caption in CAPTIONS]
    alone, together = cache(model, CAPTIONS[:1]), cache(model, [*many, CAPTIONS[0]])
    assert len(together.embeddings) > text_cache.ENCODING_BATCH
    for key, row in alone.embeddings.items():
        assert torch.equal(row, together.embeddings[key])


def test_pictures_are_the_same_and_t5_is_freed(model):
    def draw() -> torch.Tensor:
        return torch.stack(list(sample_images(model, CAPTIONS[:2], [0, 1], num_inference_steps=3))).int()

    before, t5 = draw(), weakref.ref(model.text_encoder)
    model.text_encoder = cache(model, CAPTIONS)
    gc.collect()
    assert t5() is None
    assert (draw() - before).abs().max() <= 1
    assert not list(lora_layers.trainable_parameters(model.text_encoder)) and not lora_layers.adapter_state(
        model.text_encoder
    )


def test_padding_as_zeros_predicts_the_same_noise(model):
    cached, predictions = cache(model, CAPTIONS), []
    for encoder in (model.text_encoder, cached):
        embeds, mask, *_ = encode_with_negative(model.tokenizer, encoder, CAPTIONS, pad_to=120)
        conditions = {"resolution": None, "aspect_ratio": None}
        torch.manual_seed(0)
        latents, timesteps = torch.randn(3, 4, 4, 4), torch.tensor([10, 500, 900])
        predictions.append(
            model.transformer(latents, embeds, timesteps, conditions, encoder_attention_mask=mask).sample
        )
    torch.testing.assert_close(*predictions, rtol=1e-4, atol=1e-5)


def test_an_unknown_caption_is_refused(model):
    with pytest.raises(UserError, match="not among the encoded ones"):
        encode_prompts(model.tokenizer, cache(model, CAPTIONS), ["something else"])
