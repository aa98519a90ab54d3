"""One text path, and images that depend on their own prompt and seed only."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from medart_core import devices, pretrained
from medart_core.errors import UserError
from medart_core.sampling import initial_noise, sample_images
from medart_core.text import clean, encode_prompts, encode_with_negative, report_long_captions

CAPTIONS = ["A chest X-ray image of normal lungs", "hazy", " A chest X-ray image of viral PNEUMONIA, dense and grey "]


@pytest.fixture(scope="module")
def model(tiny_pixart):
    return pretrained.load(tiny_pixart, torch.float32, torch.device("cpu"))


def test_cleaning_is_that_of_the_stock_pipeline(model):
    from diffusers import PixArtAlphaPipeline

    stock = PixArtAlphaPipeline._text_preprocessing(None, CAPTIONS, clean_caption=False)  # type: ignore[arg-type]
    assert [clean(caption) for caption in CAPTIONS] == stock


def test_captions_that_would_be_cut_are_reported(model):
    lengths = [len(model.tokenizer(clean(caption)).input_ids) for caption in CAPTIONS]
    fits = report_long_captions(model.tokenizer, CAPTIONS, max(lengths))
    assert fits == f"captions: at most {max(lengths)} tokens, 0 of 3 are cut at {max(lengths)}"
    cut = report_long_captions(model.tokenizer, CAPTIONS, max(lengths) - 1)
    assert "1 of 3 are cut" in cut and repr(CAPTIONS[2]) in cut


@pytest.mark.parametrize("limit", [24, 77])  # a multiple of 8, and none
def test_captions_are_cut_at_any_length(model, limit):
    embeds, mask = encode_prompts(model.tokenizer, model.text_encoder, ["a chest " * 200, "a chest"], limit)
    assert embeds.shape[:2] == mask.shape == (2, limit) and mask[0].all() and not mask[1].all()


def test_embeddings_are_those_of_the_stock_pipeline(model):
    from diffusers import PixArtAlphaPipeline

    pipe = PixArtAlphaPipeline(model.tokenizer, model.text_encoder, model.vae, model.transformer, model.scheduler)
    stock: Any = pipe.encode_prompt(CAPTIONS)
    ours = encode_with_negative(model.tokenizer, model.text_encoder, CAPTIONS, pad_to=120)
    assert torch.equal(stock[1], ours[1]) and torch.equal(stock[3], ours[3])
    torch.testing.assert_close(stock[0], ours[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stock[2], ours[2], rtol=1e-5, atol=1e-5)


def test_padding_to_the_longest_predicts_the_same_noise_as_padding_to_120(model):
    latents, timesteps = torch.randn(3, 4, 4, 4), torch.tensor([10, 500, 900])
    predictions = []
    for pad_to in (None, 120):
        embeds, mask = encode_prompts(model.tokenizer, model.text_encoder, CAPTIONS, pad_to=pad_to)
        conditions = {"resolution": None, "aspect_ratio": None}
        out = model.transformer(latents, embeds, timesteps, conditions, encoder_attention_mask=mask).sample
        predictions.append(out)
        assert (embeds.shape[1] == 120) == (pad_to == 120)
    torch.testing.assert_close(*predictions, rtol=1e-4, atol=1e-5)


def test_training_and_guidance_encode_a_caption_alike(model):
    alone, alone_mask = encode_prompts(model.tokenizer, model.text_encoder, CAPTIONS)
    guided, guided_mask, *_ = encode_with_negative(model.tokenizer, model.text_encoder, CAPTIONS)
    assert torch.equal(alone_mask, guided_mask)
    torch.testing.assert_close(alone, guided, rtol=1e-5, atol=1e-5)


def images(model, prompts, seeds, **kwargs):
    return torch.stack(list(sample_images(model, prompts, seeds, num_inference_steps=3, **kwargs))).int()


def test_an_image_does_not_depend_on_its_neighbours(model):
    alone = images(model, [CAPTIONS[0]], [7], batch_size=2)
    together = images(model, [CAPTIONS[2], CAPTIONS[1], CAPTIONS[0]], [1, 2, 7], batch_size=2)
    assert torch.equal(alone[0], together[2])


def test_batch_size_changes_at_most_one_grey_level(model):
    prompts, seeds = CAPTIONS * 2, list(range(6))
    difference = images(model, prompts, seeds, batch_size=1) - images(model, prompts, seeds, batch_size=4)
    assert difference.abs().max() <= 1


def test_seeds_and_prompts_matter(model):
    drawn = images(model, [CAPTIONS[0], CAPTIONS[0], CAPTIONS[1]], [0, 1, 0])
    assert all(not torch.equal(a, b) for a, b in pairwise(drawn)) and drawn.shape == (3, 32, 32, 3)
    assert np.array_equal(initial_noise([5], 4, 2, 2)[0], initial_noise([3, 5], 4, 2, 2)[1])


def test_a_folder_that_is_no_pipeline_is_named(tmp_path):
    with pytest.raises(UserError, match="no PixArt pipeline folder: tokenizer"):
        pretrained.load(tmp_path, torch.float32, torch.device("cpu"))


def test_fp16_is_refused_and_bf16_falls_back_where_it_is_emulated(monkeypatch):
    with pytest.raises(UserError, match="T5 overflows"):
        devices.pick_dtype("fp16", torch.device("cpu"))
    monkeypatch.setattr(devices, "bf16_is_native", lambda device: False)
    dtype, remark = devices.pick_dtype("bf16", torch.device("cpu"))
    assert dtype is torch.float32 and remark and "not native" in remark
