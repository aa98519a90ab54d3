"""What the web demo draws with: PixArt, whose LoRA changes from picture to picture, and DiT; stopped at any step."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn

from medart_core import devices, dit_checkpoint, dit_sampling, lora, pretrained, text, tuned_model
from medart_core.app_orders import DiTOrder, PixArtOrder
from medart_core.sampling import sample_images

SAMPLER = "dpm++"

OnStep = Callable[[], None]  # may raise, to end the drawing


@contextmanager
def before_each_call(network: nn.Module, on_step: OnStep) -> Iterator[None]:
    """Call `on_step` whenever `network` is about to run: once for each step of a sampler."""
    handle = network.register_forward_pre_hook(lambda *_: on_step())
    try:
        yield
    finally:
        handle.remove()


class OpenDiT(NamedTuple):
    """A DiT with its decoder and the names of its classes."""

    model: Any
    vae: Any
    labels: list[str]


class Studio:
    """The models, loaded once; one picture is drawn at a time.

    A caller who is told to stop is still inside a step when the page lets the next one through: that one waits for it.
    """

    def __init__(
        self,
        model: str | None,
        factories: Mapping[str, Callable[..., Any]],
        inside: Callable[[str], object],
    ):
        """`model` is a PixArt folder or hub id, None the bundled one; `factories` make DiTs by name.

        `inside` raises UserError for the path of a decoder that may not be read.
        """
        self.device = devices.pick_device()
        self.dtype = devices.named_dtype("auto", self.device)
        self.pixart = pretrained.load(model, self.dtype, self.device)
        self.factories, self.inside = factories, inside
        self._drawing = threading.Lock()
        self._dit: tuple[tuple[Path, float], OpenDiT] | None = None

    @property
    def sizes(self) -> range:
        """Sides that can be asked for: from half to twice what the model was made for, as the model divides them."""
        step = 2 * self.pixart.vae_scale_factor
        return range(self.pixart.image_size // 2 // step * step, 2 * self.pixart.image_size + 1, step)

    def left_out(self, prompt: str) -> int:
        """How many tokens of a prompt the model does not read."""
        return max(0, text.count_tokens(self.pixart.tokenizer, [prompt])[0] - text.MAX_TOKENS)

    def draw(self, order: PixArtOrder, tuned: Path | None, on_step: OnStep) -> Image.Image:
        """The picture that sample.py draws with the same seed."""
        settings = tuned_model.run_settings(tuned) if tuned else {}
        adapters = lora.read(tuned) if tuned else {}
        with (
            self._drawing,
            lora.applied(self.pixart, adapters, order.strength),
            before_each_call(self.pixart.transformer, on_step),
        ):
            [pixels] = sample_images(
                self.pixart,
                [order.prompt],
                [order.seed],
                image_size=order.size,
                num_inference_steps=order.steps,
                guidance_scale=order.cfg,
                negative_prompt=order.negative_prompt,
                max_token_length=settings.get("max_token_length") or text.MAX_TOKENS,
                batch_size=1,
            )
        return Image.fromarray(pixels.numpy())

    def dit(self, ckpt: Path) -> OpenDiT:
        """The DiT of a checkpoint; the last one is kept."""
        key = ckpt, ckpt.stat().st_mtime
        if self._dit is None or self._dit[0] != key:
            self._dit = None  # before the next one is loaded
            model, weights = dit_checkpoint.open_model(self.factories, ckpt)
            decoder = weights.vae(None, "mse")
            if decoder not in pretrained.VAES:
                self.inside(decoder)
            vae = pretrained.load_vae(decoder, torch.float32, self.device)
            labels = weights.args.get("class_names") or [str(number) for number in range(model.num_classes)]
            self._dit = key, OpenDiT(model.to(self.device, self.dtype), vae, labels)
        return self._dit[1]

    def draw_class(self, order: DiTOrder, ckpt: Path, on_step: OnStep) -> Iterator[Image.Image]:
        """The pictures that sample.py draws with the same seed, one by one."""
        opened = self.dit(ckpt)
        label = opened.labels.index(order.label)
        for number in range(order.images):
            with self._drawing, before_each_call(opened.model.blocks[0], on_step):
                [pixels] = dit_sampling.sample_images(
                    opened.model,
                    opened.vae,
                    [label],
                    range(number, number + 1),
                    seed=order.seed,
                    batch_size=1,
                    sampler=SAMPLER,
                    num_steps=order.steps,
                    cfg_scale=order.cfg,
                    guided_channels=order.guided_channels,
                )
            yield Image.fromarray(pixels.numpy())
