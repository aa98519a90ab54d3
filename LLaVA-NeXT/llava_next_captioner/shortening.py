"""Making a description that is only too long fit: by dropping sentences, or by a T5 model as in the paper."""

from collections.abc import Callable
from typing import Any

from llava_next_captioner.checks import sentences
from llava_next_captioner.engines import CaptionerError

Fits = Callable[[str], bool]


def drop_sentences(text: str, fits: Fits) -> str | None:
    """`text` without as many sentences at its end as it takes to fit, or None where not even the first one does."""
    kept = sentences(text)
    while kept:
        shorter = "".join(kept).strip()
        if fits(shorter):
            return shorter
        kept.pop()
    return None


class T5Shortener:
    """Rewrites with a T5 model, as the paper does: beam search of 4, 90 to 120 tokens, after the word "simplify".

    The model is loaded at the first call; `fits` should check the whole of what is asked of a caption, as a rewriting
    may change what is said.
    """

    def __init__(self, model: str = "t5-large", device: str = "cpu"):
        self.model, self.device = model, device
        self._loaded: tuple[Any, Any] | None = None

    def __call__(self, text: str, fits: Fits) -> str | None:
        """The rewritten text, or None where it does not fit."""
        tokenizer, model = self._load()
        ids = tokenizer(f"simplify: {text}", return_tensors="pt", max_length=512, truncation=True).to(self.device)
        output = model.generate(**ids, max_length=120, min_length=90, num_beams=4, early_stopping=True)
        shorter = tokenizer.decode(output[0], skip_special_tokens=True).strip()
        return shorter if fits(shorter) else None

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import AutoTokenizer, T5ForConditionalGeneration

            try:
                tokenizer = AutoTokenizer.from_pretrained(self.model)
                model: Any = T5ForConditionalGeneration.from_pretrained(self.model)
            except (OSError, ValueError) as error:
                first = (str(error).splitlines() or [type(error).__name__])[0]
                raise CaptionerError(
                    f"cannot load the shortener {self.model}: {first.rstrip('.')}; download it where there is a "
                    f"network (hf download {self.model}), or shorten by dropping sentences"
                ) from error
            self._loaded = tokenizer, model.to(self.device).eval()
        return self._loaded
