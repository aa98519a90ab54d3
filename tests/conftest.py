"""A tiny PixArt pipeline of the real classes with random weights, and twelve real X-rays, for all tests."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def x_rays() -> Path:
    """Folder with twelve shrunk chest X-rays (CC0) and their metadata.csv."""
    return ROOT / "tests" / "data"


@pytest.fixture(scope="session")
def tiny_pixart(tmp_path_factory) -> Path:
    """A PixArtAlphaPipeline folder for 32 px images, with the bundled tokenizer."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "nano" / "pixart" / "tokenizer")
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, num_heads=2, d_ff=32, num_layers=2,
                 feed_forward_proj="gated-gelu", dropout_rate=0.1)
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 4,  # pyright: ignore[reportArgumentType]
        block_out_channels=(8, 8, 8, 8),  # pyright: ignore[reportArgumentType]
        layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32,
    )  # fmt: skip
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, cross_attention_dim=16, sample_size=4,
        caption_channels=16, interpolation_scale=1,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    folder = tmp_path_factory.mktemp("tiny") / "pixart"
    PixArtAlphaPipeline(tokenizer, text_encoder, vae, transformer, scheduler).save_pretrained(folder)
    return folder
