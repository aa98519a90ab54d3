"""Backpropagation through DPM-Solver++ sampling of PixArt, on the official diffusers classes."""

from diffusers_grad.sampler import GRADIENT_MODES, decode_latents, sample_latents, size_conditions

__all__ = ["GRADIENT_MODES", "decode_latents", "sample_latents", "size_conditions"]
