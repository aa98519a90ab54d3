"""Every `from_pretrained` of PixArt's parts, and the bundled default model."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from transformers import AutoTokenizer, T5EncoderModel

from medart_core import quantization
from medart_core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
NANO = "nano/pixart"  # the bundled default, from the project's root
NANO_SIZE = 128
PARTS = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")
NOT_OF_THE_FILES = (torch.OutOfMemoryError, ImportError, UserError)  # what no download mends
VAES = {  # of DiT, by the name that --vae takes
    "ema": "stabilityai/sd-vae-ft-ema",
    "mse": "stabilityai/sd-vae-ft-mse",
    "nano": f"{NANO}/vae",
}


@dataclass
class PixArt:
    """The five parts of a PixArtAlphaPipeline; the models are frozen and in evaluation mode.

    They are typed as Any: PEFT may wrap them, and the libraries' annotations hide `config` and the outputs' fields.
    """

    tokenizer: Any
    text_encoder: Any
    vae: Any
    transformer: Any
    scheduler: Any
    name: str

    @property
    def image_size(self) -> int:
        """The resolution in pixels that the transformer was made for."""
        return self.transformer.config.sample_size * self.vae_scale_factor

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along a side: 8 for the published VAE."""
        return vae_scale_factor(self.vae)


def vae_scale_factor(vae: Any) -> int:
    """Pixels per latent along a side of an AutoencoderKL."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def find(name: str | Path | None) -> str:
    """The folder of a model, or its hub id; `None` is the bundled nano model, folders may be named from the root."""
    path = str(NANO if name is None else name)
    return str(ROOT / path) if not Path(path).is_dir() and (ROOT / path).is_dir() else path


def vae_name(name: str) -> str:
    """A VAE's name for `load_vae` that means the same in any working directory: a folder's is its absolute path."""
    path = Path(find(name))
    return name if name in VAES or not path.is_dir() else str(path.resolve())


def load_vae(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The frozen AutoencoderKL of one of the `VAES`, of a folder (a pipeline's or its own) or of a hub id.

    Raises:
        UserError: if it is damaged, or cannot be fetched.
    """
    path = find(VAES.get(name, name))
    if (Path(path) / "vae").is_dir():
        path = str(Path(path) / "vae")
    try:
        vae = _whole(AutoencoderKL, path, None, torch_dtype=dtype)
    except NOT_OF_THE_FILES:
        raise
    except Exception as error:  # of a dozen types, see `load`
        fault = (str(error).strip() or "a file is empty").splitlines()[0].rstrip(".")
        if not Path(path).is_dir():
            fault = f"it is no folder here, and the hub did not give it ({fault})"
        raise UserError(
            f"cannot load the VAE {path}: {fault}. Download it where there is a network (hf download {path}) "
            "and give its folder as --vae, or use the small bundled one: --vae nano"
        ) from error
    return vae.to(device).requires_grad_(False).eval()


def load(
    name: str | Path | None,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
    variant: str | None = None,
    text_encoder_quantization: str | None = None,
    cache_dir: str | None = None,
) -> PixArt:
    """Load a PixArt-alpha pipeline's parts from a folder or a hub id; `None` is the bundled nano model.

    Files are mapped into memory and tensors converted one by one, so that no model is held twice.
    `text_encoder_quantization` is `int8`, `nf4` or None.

    Raises:
        UserError: if a part is missing, damaged, of another model, or cannot be fetched.
    """
    path = find(name)
    places = (("revision", revision), ("cache_dir", cache_dir))
    where: dict[str, Any] = {name: value for name, value in places if value}
    weights = {**where, "variant": variant, "use_safetensors": None} if variant else where
    if Path(path).is_dir() and (missing := [part for part in PARTS if not (Path(path) / part).is_dir()]):
        raise UserError(
            f"{path} is no PixArt pipeline folder: {', '.join(missing)} missing; give a folder or a hub id"
        )
    try:
        parts = PixArt(
            tokenizer=AutoTokenizer.from_pretrained(path, subfolder="tokenizer", **where),
            text_encoder=_load_text_encoder(path, dtype, device, text_encoder_quantization, **weights),
            vae=_whole(AutoencoderKL, path, "vae", torch_dtype=dtype, **weights),
            transformer=_whole(PixArtTransformer2DModel, path, "transformer", torch_dtype=dtype, **weights),
            scheduler=DPMSolverMultistepScheduler.from_pretrained(path, subfolder="scheduler", **where),
            name=str(name or NANO),
        )
    except NOT_OF_THE_FILES:
        raise
    except Exception as error:  # of a dozen types, for the libraries meet damaged and foreign files in their own ways
        first_line = (str(error).strip() or "a file is empty").splitlines()[0].rstrip(".")
        remedy = (
            f"Download it where there is a network (hf download {path}) and give the folder, or set HF_HOME to a cache"
        )
        if Path(path).is_dir():
            remedy = "The folder is not whole: copy or download it again"
        raise UserError(f"cannot load {path}: {first_line}. {remedy}") from error
    for part in (parts.vae, parts.transformer):
        part.to(device)
    for part in (parts.text_encoder, parts.vae, parts.transformer):
        part.requires_grad_(False).eval()
    return parts


def _whole(model_type: Any, path: str, part: str | None, **loading: Any) -> Any:
    """A part from its folder, or what lies in `path` itself.

    Raises ValueError where weights are missing, which would be left empty or random.
    """
    model, found = model_type.from_pretrained(path, subfolder=part, output_loading_info=True, **loading)
    if missing := sorted(found["missing_keys"]):
        name = part or path
        raise ValueError(f"{name} lacks {len(missing)} weights such as {missing[0]}: its file is of another model")
    return model


def _load_text_encoder(path: str, dtype: torch.dtype, device: torch.device, quantize: str | None, **where: Any):
    """T5, each tensor straight to `device`: what is packed there cannot be moved, and 19 GB should not be."""
    load_to_device = partial(
        _whole, T5EncoderModel, path, "text_encoder", dtype=dtype, device_map={"": str(device)}, **where
    )
    if quantize is None:
        return load_to_device()
    with quantization.every_layer():
        text_encoder = load_to_device(quantization_config=quantization.config(quantize, dtype))
    quantization.finish(text_encoder, quantize)
    return text_encoder


def set_gradient_checkpointing(model: PixArt, wanted: bool) -> None:
    """Whether the blocks of the transformer, of T5 and of the VAE decoder are recomputed in the backward pass.

    To be changed between a backward pass and the next forward pass only: what is recomputed reads the setting again.
    """
    if not wanted:
        model.transformer.disable_gradient_checkpointing()
        model.vae.disable_gradient_checkpointing()
        model.text_encoder.eval()
        return
    model.transformer.enable_gradient_checkpointing()
    model.vae.enable_gradient_checkpointing()
    if not hasattr(model.text_encoder, "gradient_checkpointing_enable"):
        return  # cached embeddings
    # transformers checkpoints in training mode only, so T5 is put there with every dropout at zero.
    for module in model.text_encoder.modules():
        for name in ("p", "dropout", "dropout_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    model.text_encoder.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
