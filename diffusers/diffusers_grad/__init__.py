"""Backpropagation through DPM-Solver++ sampling of PixArt, on the official diffusers classes."""

import logging

# diffusers loads bitsandbytes where it is installed, which warns at once of a 4-bit CPU kernel that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from diffusers_grad.sampler import GRADIENT_MODES, decode_latents, sample_latents, size_conditions  # noqa: E402

__all__ = ["GRADIENT_MODES", "decode_latents", "sample_latents", "size_conditions"]
