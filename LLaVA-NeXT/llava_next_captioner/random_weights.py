"""LLaVA-NeXT with seeded random weights, at the published shapes or at any others: for measuring, and for tests."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights

from llava_next_captioner.decoding import Sampling
from llava_next_captioner.engines import CaptionerError
from llava_next_captioner.transformers_engine import TransformersEngine

SPECIAL = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<image>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Llama 3 8B with 64 more rows for the image token, CLIP ViT-L/14 at 336 px.
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama3-llava-next-8b": {
        "text_config": LlamaConfig(
            vocab_size=128320, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, max_position_embeddings=8192, rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        ),
        "vision_config": CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
            patch_size=14, projection_dim=768,
        ),
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    }
}  # fmt: skip


def random_engine(name: str = "llama3-llava-next-8b", *, seed: int = 0, dtype: torch.dtype = torch.bfloat16,
                  device: str | torch.device = "cpu", attn: str = "sdpa", sampling: Sampling | None = None,
                  prefill_batch: int = 8) -> TransformersEngine:  # fmt: skip
    """An engine of a published model's shapes: its tokens are bytes, and what it says is noise of full length."""
    if name not in PUBLISHED:
        raise CaptionerError(f"the shapes of {name} are not known: choose from {', '.join(PUBLISHED)}")
    shapes = PUBLISHED[name]
    processor = byte_processor(shapes["vision_config"], shapes["image_grid_pinpoints"])
    config = LlavaNextConfig(**shapes, image_token_index=processor.image_token_id)
    model = random_model(config, seed=seed, dtype=dtype, device=device, attn=attn)
    return TransformersEngine.of(f"random-weights/{name}", model, processor, seed, sampling, prefill_batch)


def random_model(config: Any, *, seed: int = 0, dtype: torch.dtype = torch.float32,
                 device: str | torch.device = "cpu", attn: str = "sdpa") -> Any:  # fmt: skip
    """A frozen `LlavaNextForConditionalGeneration`, each weight drawn where it will stay; on `meta` there are none."""
    before = torch.get_default_dtype()
    config._attn_implementation = attn
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device), no_init_weights():
            model: Any = LlavaNextForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    if torch.device(device).type != "meta":
        _fill(model, torch.Generator(device).manual_seed(seed))
    return model.requires_grad_(False).eval()


@torch.no_grad()
def _fill(model: nn.Module, draws: torch.Generator) -> None:
    """Norms to 1, biases to 0, all else uniform with the standard deviation that keeps activations near 1."""
    for module in model.modules():
        for name, values in module.named_parameters(recurse=False):
            if name == "bias":
                values.fill_(0)
            elif values.dim() == 1 and name == "weight":
                values.fill_(1)
            else:
                embedding = values.dim() == 1 or isinstance(module, nn.Embedding)
                limit = 3**0.5 * (0.5 if embedding else (len(values) / values.numel()) ** 0.5)
                values.uniform_(-limit, limit, generator=draws)


def byte_processor(vision: Any, grid: list[list[int]]) -> Any:
    """A `LlavaNextProcessor` for a CLIP tower of these settings, whose tokens are bytes and a few special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[1],
        additional_special_tokens=list(SPECIAL[2:]),
    )  # fmt: skip
    side = vision.image_size
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=grid
    )
    return LlavaNextProcessor(
        image_processor=images, tokenizer=fast, patch_size=vision.patch_size, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
