"""The one path from a caption to what the transformer reads, for training, HLDF and sampling alike."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from medart_core.errors import UserError

MAX_TOKENS = 120  # PixArt-alpha was trained on 120 T5 tokens (arXiv:2310.00426, section 3.1)
PAD_TO_MULTIPLE = 8


def clean(caption: str) -> str:
    """Lower case without outer white space: what stock diffusers does with `clean_caption=False`."""
    return caption.lower().strip()


def load_tokenizer(name: str) -> Any:
    """The T5 tokenizer of a PixArt pipeline (folder or hub id), or of a folder that holds nothing else."""
    from transformers import AutoTokenizer

    place = {} if (Path(name) / "tokenizer_config.json").is_file() else {"subfolder": "tokenizer"}
    try:
        return AutoTokenizer.from_pretrained(name, **place)
    except (OSError, ValueError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"cannot load the tokenizer of {name}: {first_line}; give --tokenizer a folder") from error


def encode_prompts(
    tokenizer,
    text_encoder,
    captions: Sequence[str],
    max_token_length: int = MAX_TOKENS,
    pad_to: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode captions with T5, padded to `pad_to` or else only to the longest of them (in steps of 8 tokens).

    Padding is masked in T5 and in PixArt's cross-attention, so its length changes the result by rounding only.

    Returns:
        prompt_embeds (B, T, C) in the encoder's dtype, and prompt_attention_mask (B, T) int64, T <= max_token_length.
    """
    tokens = tokenizer(
        [clean(caption) for caption in captions],
        padding="max_length" if pad_to else "longest",
        # Cut at a length that is no multiple, they cannot be padded to one.
        pad_to_multiple_of=None if pad_to or max_token_length % PAD_TO_MULTIPLE else PAD_TO_MULTIPLE,
        max_length=pad_to or max_token_length,
        truncation=True,
        return_tensors="pt",
    ).to(text_encoder.device)
    prompt_embeds = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
    return prompt_embeds, tokens.attention_mask


def encode_with_negative(
    tokenizer,
    text_encoder,
    captions: Sequence[str],
    negative_prompt: str = "",
    max_token_length: int = MAX_TOKENS,
    pad_to: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Encode captions and the negative prompt in one call, for classifier-free guidance.

    Returns:
        prompt_embeds (B, T, C), prompt_attention_mask (B, T), and the same two of the negative prompt, B times.
    """
    embeds, mask = encode_prompts(tokenizer, text_encoder, [*captions, negative_prompt], max_token_length, pad_to)
    count = len(captions)
    return embeds[:-1], mask[:-1], embeds[-1:].expand(count, -1, -1), mask[-1:].expand(count, -1)


def count_tokens(tokenizer, captions: Sequence[str]) -> list[int]:
    """Number of T5 tokens of each caption, end token included, untruncated."""
    return [len(ids) for ids in tokenizer([clean(caption) for caption in captions]).input_ids]


def report_long_captions(tokenizer, captions: Sequence[str], max_token_length: int = MAX_TOKENS) -> str:
    """One line on how many captions are cut, and which one is the longest."""
    counts = count_tokens(tokenizer, captions)
    longest = max(range(len(counts)), key=counts.__getitem__)
    cut = sum(count > max_token_length for count in counts)
    line = f"captions: at most {counts[longest]} tokens, {cut} of {len(counts)} are cut at {max_token_length}"
    return f"{line}; shorten them, the longest is {captions[longest][:80]!r}..." if cut else line
