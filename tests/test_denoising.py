"""The noise loss with its weights and offsets, and the validation loss that repeats itself."""

import dataclasses

import pytest
import torch
from diffusers import DDPMScheduler, PixArtTransformer2DModel

from medart_core import data, pretrained
from medart_core.denoising import VALIDATION_BATCH, denoising_loss, validation_loss
from medart_core.objectives import min_snr_weights, noise_prediction_loss
from medart_core.seeds import SharedDraws


@pytest.fixture(scope="module")
def model(tiny_pixart):
    return pretrained.load(tiny_pixart, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def scheduler(model):
    return DDPMScheduler.from_config(model.scheduler.config)


@pytest.fixture(scope="module")
def images(x_rays):
    examples = data.load_examples(str(x_rays), show_progress=False)
    return data.CaptionDataset(examples, data.ImageTransform(32, center_crop=True), seed=0)


def loss(model, scheduler, images, **changes) -> float:
    batch = data.collate([images[0, index] for index in range(4)])
    with torch.no_grad():
        draws = SharedDraws((5,), 4)
        return denoising_loss(model, scheduler, batch, draws, max_token_length=120, **changes).item()


def test_min_snr_weights_follow_the_paper(scheduler):
    timesteps = torch.tensor([0, 300, 999])
    alpha_bar = scheduler.alphas_cumprod.double()[timesteps]
    snr = alpha_bar / (1 - alpha_bar)
    weights = min_snr_weights(scheduler.alphas_cumprod, timesteps, 5.0)
    torch.testing.assert_close(weights.double(), torch.minimum(snr, torch.tensor(5.0)) / snr, rtol=1e-4, atol=0)
    assert weights[0] < 0.01 and weights[2] == 1


def test_weights_multiply_each_images_error():
    prediction, noise = torch.zeros(2, 8, 4, 4), torch.stack([torch.ones(4, 4, 4), torch.full((4, 4, 4), 2.0)])
    assert noise_prediction_loss(prediction, noise) == pytest.approx(2.5)
    assert noise_prediction_loss(prediction, noise, torch.tensor([1.0, 0.25])) == pytest.approx(1.0)


def test_each_option_of_the_loss_changes_it_and_the_default_does_not(model, scheduler, images):
    plain = loss(model, scheduler, images)
    assert loss(model, scheduler, images, snr_gamma=1e9, noise_offset=0.0) == pytest.approx(plain, rel=1e-6)
    assert loss(model, scheduler, images, snr_gamma=0.1) < plain
    assert loss(model, scheduler, images, noise_offset=3.0) > plain * 3  # ten times the variance to predict
    assert loss(model, scheduler, images, proportion_empty_prompts=1.0) != plain


def test_the_1024_px_checkpoint_is_told_the_size(model, scheduler, images):
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=1, cross_attention_dim=24, sample_size=128,
        caption_channels=16, interpolation_scale=1,
    )  # fmt: skip
    large = dataclasses.replace(model, transformer=transformer.eval())
    assert transformer.use_additional_conditions and loss(large, scheduler, images) > 0


def test_the_validation_loss_is_the_mean_over_images_and_repeats_itself(model, scheduler, images):
    assert len(images) > VALIDATION_BATCH
    first, second = (validation_loss(model, scheduler, images, 120) for _ in range(2))
    assert first == second
    by_hand = []
    for start in (0, VALIDATION_BATCH):
        rows = [images[0, index] for index in range(start, min(start + VALIDATION_BATCH, len(images)))]
        with torch.no_grad():
            draws = SharedDraws((3, start), len(rows))
            part = denoising_loss(model, scheduler, data.collate(rows), draws, max_token_length=120)
        by_hand += [part.item()] * len(rows)
    assert first == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-6)
