"""The bundled models: stock diffusers loads them, they are small, and the records say how good they are."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medart_core import lora, pretrained
from medart_core.images import open_image
from medart_core.sampling import sample_images

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "nano" / "pixart"
LORAS = ("lora-chest-xray", "lora-chest-xray-without-hldf")


def megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def test_sizes():
    assert megabytes(NANO) <= 18
    for name in LORAS:
        assert megabytes(ROOT / "nano" / name) <= 1.5


@pytest.fixture(scope="module")
def model():
    return pretrained.load(None, torch.float32, torch.device("cpu"))


def test_a_newcomer_loads_it_with_stock_diffusers_and_gets_our_image(model):
    from diffusers import PixArtAlphaPipeline

    pipeline: Any = PixArtAlphaPipeline.from_pretrained(str(NANO))
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    prompt = "A photo of a flower"
    stock = pipeline(prompt, use_resolution_binning=False, clean_caption=False, num_inference_steps=4, latents=noise)
    [ours] = sample_images(model, [prompt], [3], num_inference_steps=4, batch_size=1)
    assert stock.images[0].size == (128, 128)
    assert np.abs(np.asarray(stock.images[0]).astype(int) - ours.numpy()).max() <= 1


def test_parts_are_what_the_method_needs(model):
    assert model.transformer.config["out_channels"] == 8 and model.transformer.config["sample_size"] == 16
    assert model.vae.config["latent_channels"] == 4 and model.vae_scale_factor == 8
    assert any(name.endswith("wi_1") for name, _ in model.text_encoder.named_modules())
    assert {p.dtype for p in model.text_encoder.parameters()} == {torch.float32}


def test_the_vae_keeps_x_rays(model, x_rays):
    """Far below the recorded quality, since these copies are shrunk; a broken VAE gives about 10 dB."""
    values = []
    for file in sorted(x_rays.glob("*.jpeg")):
        pixels = np.asarray(open_image(file).resize((128, 128)))
        pixels = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        decoded = model.vae.decode(model.vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(10 * torch.log10(4 / (decoded - pixels).square().mean()).item())
    assert np.mean(values) > 27


@pytest.mark.parametrize("name", LORAS)
def test_a_bundled_lora_makes_the_base_grey(name):
    model = pretrained.load(None, torch.float32, torch.device("cpu"))
    prompt, seeds = ["A chest X-ray image of normal lungs"] * 2, [0, 1]

    def chroma() -> float:
        images = torch.stack(list(sample_images(model, prompt, seeds, num_inference_steps=10))).float()
        return (images.amax(dim=-1) - images.amin(dim=-1)).mean().item()

    base = chroma()
    adapters = lora.read(ROOT / "nano" / name)
    lora.apply(model, adapters)
    assert chroma() < base / 2
    assert lora.base_model(adapters) == "nano/pixart"


def test_records_of_quality_are_there():
    vae = json.loads((ROOT / "nano" / "records" / "vae.json").read_text())
    check = json.loads((ROOT / "nano" / "records" / "pixart-check.json").read_text())
    assert vae["held_out_psnr_db"].keys() == {"x-ray", "flower"}
    assert check["images"] == 200 and check["agreement"] >= 0.6


def test_every_script_in_a_subfolder_runs_from_another_folder(tmp_path):
    scripts = [*ROOT.glob("nano/*.py"), *ROOT.glob("benchmarks/*.py")]
    scripts = [script for script in scripts if "__main__" in script.read_text()]
    running = [
        subprocess.Popen([sys.executable, str(script), "--help"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for script in scripts
    ]
    for script, process in zip(scripts, running, strict=True):
        assert "usage:" in process.communicate(timeout=300)[0], script
        assert process.returncode == 0, script
