"""Seconds of a colour step of the bundled model for every gradient mode, as a ratio to the full gradient.

    python benchmarks/hldf_step.py --rounds 5

The modes take turns within each round, since machines drift; medians are printed, and last one line of JSON.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from diffusers_grad import GRADIENT_MODES, decode_latents, sample_latents
from medart_core import lora, pretrained
from medart_core.objectives import color_distribution_loss
from medart_core.sampling import initial_noise
from medart_core.text import encode_with_negative


def color_step(model: pretrained.PixArt, gradient: str, checkpointing: bool, steps: int) -> float:
    """Seconds of one rollout, decoding and backward pass of a single image."""
    start = time.perf_counter()
    text = encode_with_negative(model.tokenizer, model.text_encoder, ["a chest x-ray image of normal lungs"])
    side = model.image_size // model.vae_scale_factor
    noise = initial_noise([0], 4, side, side).to(model.vae.device)
    generator = torch.Generator().manual_seed(steps)
    latents = sample_latents(
        model.transformer, model.scheduler, noise, *text,
        num_inference_steps=steps, gradient=gradient, checkpoint_steps=checkpointing, generator=generator,
    )  # fmt: skip
    pixels = decode_latents(model.vae, latents, checkpointing=checkpointing)
    color_distribution_loss(pixels, torch.zeros_like(pixels)).backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one to warm up (default 5)")
    parser.add_argument("--steps", type=int, default=20, help="DPM-Solver++ steps M (default 20)")
    options = parser.parse_args()
    device = pretrained.pick_device()
    model = pretrained.load(None, torch.float32, device)
    model.transformer = lora.attach(model.transformer, lora.TRANSFORMER_TARGETS, rank=8)
    cases = [(mode, False) for mode in GRADIENT_MODES[:-1]] + [("full", True)]
    seconds: dict[tuple[str, bool], list[float]] = {case: [] for case in cases}
    for round_number in range(options.rounds + 1):
        for case in cases:
            taken = color_step(model, *case, options.steps)
            if round_number:
                seconds[case].append(taken)
    full = statistics.median(seconds["full", False])
    result = {}
    for (mode, checkpointing), values in seconds.items():
        name, median = mode + (" checkpointed" if checkpointing else ""), statistics.median(values)
        result[name] = {"seconds": round(median, 3), "of_full": round(median / full, 3)}
        print(f"{name:20} {median:7.3f} s   {median / full:5.2f} of full", flush=True)
    print(json.dumps({"device": device.type, "M": options.steps, "rounds": options.rounds, "modes": result}))


if __name__ == "__main__":
    main()
