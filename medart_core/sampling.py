"""From prompts to pictures: every image depends on its own prompt and seed only."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from diffusers_grad import decode_latents, sample_latents
from medart_core.errors import UserError
from medart_core.pretrained import PixArt
from medart_core.text import MAX_TOKENS, encode_with_negative


def initial_noise(seeds: Sequence[int], channels: int, height: int, width: int) -> Tensor:
    """Standard normal latents, row i from seed i alone, on the CPU: (B, channels, height, width) float32."""
    rows = [torch.randn(channels, height, width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


def groups(count: int, size: int) -> list[range]:
    """Cut images 0 ... count - 1 into ranges of `size`; how they are shared out then changes no bit of an image."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def padded(rows: Sequence[int], size: int) -> list[int]:
    """`rows`, filled up to `size` by repeating the first: what a network is given has always the same shape."""
    return [*rows, *[rows[0]] * (size - len(rows))]


def to_uint8(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8 on the CPU."""
    return pixels.clamp(-1, 1).add(1).mul(127.5).round().permute(0, 2, 3, 1).to("cpu", torch.uint8)


@torch.no_grad()
def sample_images(
    model: PixArt,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    image_size: int | tuple[int, int] | None = None,
    num_inference_steps: int = 20,
    guidance_scale: float = 4.5,
    negative_prompt: str = "",
    max_token_length: int = MAX_TOKENS,
    batch_size: int = 4,
) -> Iterator[Tensor]:
    """Yield one (H, W, 3) uint8 image for each pair of prompt and seed, in order.

    Work goes through the network in groups of exactly `batch_size` (the last one is padded) and every prompt is
    encoded alone, so that an image has the same bits whatever its neighbours are.
    """
    size = model.image_size if image_size is None else image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    factor, device = model.vae_scale_factor, model.transformer.device
    texts = {}
    for prompt in dict.fromkeys(prompts):
        texts[prompt] = encode_with_negative(
            model.tokenizer, model.text_encoder, [prompt], negative_prompt, max_token_length, pad_to=max_token_length
        )
    for rows in groups(len(prompts), batch_size):
        filled = padded(rows, batch_size)
        text = (torch.cat(parts) for parts in zip(*(texts[prompts[row]] for row in filled), strict=True))
        channels = model.transformer.config.in_channels
        noise = initial_noise([seeds[row] for row in filled], channels, height // factor, width // factor)
        latents = sample_latents(
            model.transformer,
            model.scheduler,
            noise.to(device),
            *text,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        yield from to_uint8(decode_latents(model.vae, latents[: len(rows)]))


def classes_in_turn(prompts: Sequence[str], labels: Sequence[str]) -> tuple[list[str], list[str]]:
    """Prompts and labels with the classes in turn, until all are in; small classes begin again from their first.

    Raises:
        UserError: if there are no labels.
    """
    if not labels:
        raise UserError("--balanced needs the classes of the prompts; give a --metadata with a column `label`")
    members = [[row for row, other in enumerate(labels) if other == label] for label in dict.fromkeys(labels)]
    turns = range(max(map(len, members)))
    rows = [of_class[turn % len(of_class)] for turn in turns for of_class in members]
    return [prompts[row] for row in rows], [labels[row] for row in rows]
