"""Training images as moments of the VAE's posterior: encoded in every step, or once and kept."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from medart_core.data import CaptionDataset, Example, collate
from medart_core.errors import UserError

ENCODING_BATCH = 8


@torch.no_grad()
def encode_moments(vae, pixel_values: Tensor) -> Tensor:
    """Mean and standard deviation of the posterior of (B, 3, H, W) pixels in [-1, 1]: (B, 2, 4, H/8, W/8) fp32."""
    posterior = vae.encode(pixel_values.to(vae.device, vae.dtype)).latent_dist
    return torch.stack([posterior.mean, posterior.std], dim=1).float()


def sample_latents(vae, moments: Tensor, noise: Tensor) -> Tensor:
    """Scaled latents (B, 4, h, w) drawn from the posterior with the given standard normal noise."""
    mean, std = moments.unbind(dim=1)
    return (mean + std * noise) * vae.config.scaling_factor


class LatentDataset(Dataset):
    """A `CaptionDataset` whose images are already encoded; keyed by (epoch, index) like the original."""

    def __init__(self, images: CaptionDataset, moments: Tensor):
        self.images, self.moments = images, moments

    def __len__(self) -> int:
        return len(self.images)

    def pixel_values(self, key: tuple[int, int]) -> Tensor:
        """The image itself, for the colour loss."""
        return self.images.pixel_values(key)

    def sources(self, batch: dict) -> list[Example]:
        """What a batch was made of."""
        return self.images.sources(batch)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        index = key[1]
        return {"moments": self.moments[index], "caption": self.images.examples[index].caption, "key": key}


def cache(images: CaptionDataset, vae, autocast: AbstractContextManager, show_progress: bool) -> LatentDataset:
    """Encode every image once, in fixed groups, so that the result does not depend on the batch size of training.

    Raises:
        UserError: if the crops differ from epoch to epoch, so that one encoding cannot stand for an image.
    """
    if not images.is_fixed():
        raise UserError(
            "--cache_latents needs crops that never change: add --center_crop and leave --random_flip out, "
            "or use images that are square already"
        )
    keys = [(0, index) for index in range(len(images))]
    loader = DataLoader(images, ENCODING_BATCH, sampler=keys, collate_fn=collate)
    with autocast:
        chunks = [
            encode_moments(vae, batch["pixel_values"]).cpu()
            for batch in tqdm(loader, desc="encoding images", disable=not show_progress)
        ]
    return LatentDataset(images, torch.cat(chunks))
