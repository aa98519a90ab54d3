"""LLaVA-NeXT through transformers: batches of unequal images, one prefill for all attempts, noise that has a name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoProcessor, LlavaNextForConditionalGeneration

from llava_next_captioner.decoding import Prefill, Sampling, decode, gumbel_noise
from llava_next_captioner.engines import Answer, CaptionerError, Request
from llava_next_captioner.token_step import FAMILIES, TokenStep

# The paper's names for what transformers reads under others.
ALIASES = {"lmms-lab/llama3-llava-next-8b": "llava-hf/llama3-llava-next-8b-hf"}
ATTENTION = ("sdpa", "flash_attention_2")
END_OF_TURN = "<|eot_id|>"  # of Llama 3, which not every checkpoint names as an end


class TransformersEngine:
    """A LLaVA-NeXT model from a folder or the hub; raises `CaptionerError` where there is none that it can run.

    By default in bf16 on CUDA, where there is a device, and else in fp32 on the CPU. `attn` is the prefill's kernel.
    `prefill_batch` prompts run through the model at once.
    """

    def __init__(
        self,
        model: str,
        *,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        attn: str = "sdpa",
        max_new_tokens: int = 150,
        temperature: float = 0.8,
        top_k: int = 50,
        top_p: float = 0.9,
        prefill_batch: int = 8,
    ):
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        sampling = Sampling(temperature, top_k, top_p, max_new_tokens)
        loaded, processor = load(ALIASES.get(model, model), dtype, device, attn)
        self._set_up(model, loaded, processor, seed, sampling, prefill_batch)

    @classmethod
    def of(cls, name: str, loaded: Any, processor: Any, seed: int = 0, sampling: Sampling | None = None,
           prefill_batch: int = 8) -> "TransformersEngine":  # fmt: skip
        """The same around a model and a processor that are there already."""
        engine = cls.__new__(cls)
        engine._set_up(name, loaded, processor, seed, sampling or Sampling(), prefill_batch)
        return engine

    def _set_up(
        self, name: str, loaded: Any, processor: Any, seed: int, sampling: Sampling, prefill_batch: int
    ) -> None:
        text = loaded.config.text_config
        if text.model_type not in FAMILIES or getattr(text, "sliding_window", None):
            raise CaptionerError(f"{name} has a language model of kind {text.model_type}, which cannot be run here: "
                                 "serve it with vLLM and use the openai engine")  # fmt: skip
        if not processor.chat_template:
            raise CaptionerError(f"{name} has no chat template: add chat_template.jinja to its folder")
        self.model, self.seed, self.sampling, self.prefill_batch = name, seed, sampling, prefill_batch
        self._loaded, self._processor, self._token_step = loaded, processor, TokenStep(loaded)
        self.stop_ids = sorted(_stop_ids(loaded, processor.tokenizer))
        if not self.stop_ids:
            raise CaptionerError(f"{name} names no token that ends an answer: set eos_token in its tokenizer")

    def prepare(self, requests: Sequence[Request]) -> "TransformersChunk":
        """Cut up and tokenise on the CPU, which may go on in another thread; the model runs at the first `sample`."""
        return TransformersChunk(self, requests, [self._inputs(request) for request in requests])

    def _inputs(self, request: Request) -> "_Inputs":
        tokenizer, image_token = self._processor.tokenizer, self._processor.image_token
        # By a space, for what stood around it must not make up another one.
        prompt, prefix = (text.replace(image_token, " ") for text in (request.prompt, request.prefix))
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        # A template that writes the beginning-of-sequence token itself must not get a second one.
        has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
        made = self._processor(
            images=request.image, text=text + prefix, add_special_tokens=not has_bos, return_tensors="pt"
        )
        return _Inputs(made["input_ids"][0], made["pixel_values"][0], made["image_sizes"][0])

    @torch.inference_mode()
    def _prefill(self, inputs: list["_Inputs"]) -> Prefill:
        """Run all prompts, those of like length together.

        A batch is padded on the right: causal attention never looks there, so that it needs no mask, which would cost
        the fast kernels.
        """
        model, lengths = self._loaded, torch.tensor([len(each.ids) for each in inputs])
        prefill = Prefill.empty(model, lengths, self.sampling.max_new_tokens)
        for rows in lengths.argsort(stable=True).split(self.prefill_batch):
            batch = [inputs[row] for row in rows]
            ids = nn.utils.rnn.pad_sequence([each.ids for each in batch], True, self.stop_ids[0])
            output = model.model(
                input_ids=ids.to(model.device),
                pixel_values=torch.cat([each.pixels for each in batch]).to(model.device, model.dtype),
                image_sizes=torch.stack([each.size for each in batch]).to(model.device),
                use_cache=True,
            )
            last = output.last_hidden_state[torch.arange(len(rows)), lengths[rows] - 1]
            prefill.fill(rows.tolist(), output.past_key_values.layers, model.lm_head(last))
        return prefill


@dataclass(frozen=True)
class _Inputs:
    """One prompt: ids (length,), crops (crops, 3, side, side) and the image's (height, width)."""

    ids: Tensor
    pixels: Tensor
    size: Tensor


class TransformersChunk:
    """Requests that share a prefill, which is computed once, when the first answers are asked for."""

    def __init__(self, engine: TransformersEngine, requests: Sequence[Request], inputs: list[_Inputs]):
        self._engine, self._requests, self._inputs = engine, requests, inputs
        self._prefill: Prefill | None = None

    def sample(self, picks: Sequence[tuple[int, int]]) -> list[Answer]:
        """One answer for each pick (index of a request, attempt), at most as many at once as there are requests.

        Raises `CaptionerError` if the GPU's memory is too small for the chunk.
        """
        answers: list[Answer] = []
        try:
            if self._prefill is None and picks:
                self._prefill = self._engine._prefill(self._inputs)
                self._inputs = []
            for start in range(0, len(picks), len(self._requests)):
                answers += self._sample(picks[start : start + len(self._requests)])
        except torch.OutOfMemoryError as error:
            count = len(self._requests)
            raise CaptionerError(f"the GPU's memory is too small for {count} images at a time: take fewer") from error
        return answers

    def _sample(self, picks: Sequence[tuple[int, int]]) -> list[Answer]:
        engine = self._engine
        assert self._prefill is not None
        names = [(self._requests[index].name, attempt) for index, attempt in picks]
        noise = torch.stack([gumbel_noise(engine.seed, *name, engine.sampling) for name in names])
        rows = self._prefill.select([index for index, _ in picks])
        written = decode(engine._token_step, rows, noise, engine.sampling, engine.stop_ids)
        return [
            self._answer(self._requests[index].prefix, tokens)
            for (index, _), tokens in zip(picks, written, strict=True)
        ]

    def _answer(self, prefix: str, tokens: list[int]) -> Answer:
        tokenizer = self._engine._processor.tokenizer
        # Decoded together, as some tokenizers drop the space at the beginning of what they decode.
        begun = tokenizer(prefix, add_special_tokens=False)["input_ids"] if prefix else []
        text = tokenizer.decode([*begun, *tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Answer(text.strip(), len(tokens), tokens[-1] in self._engine.stop_ids)


def load(model: str, dtype: torch.dtype, device: torch.device, attn: str = "sdpa") -> tuple[Any, Any]:
    """A frozen `LlavaNextForConditionalGeneration` and its processor, from a folder or the hub."""
    if attn not in ATTENTION:
        raise CaptionerError(f"unknown attention {attn}: choose from {', '.join(ATTENTION)}")
    try:
        kind = AutoConfig.from_pretrained(model).model_type
        if kind != "llava_next":
            raise CaptionerError(f"{model} is a model of kind {kind}, not llava_next")
        processor: Any = AutoProcessor.from_pretrained(model)
        loaded: Any = LlavaNextForConditionalGeneration.from_pretrained(model, dtype=dtype, attn_implementation=attn)
    except CaptionerError:
        raise
    except Exception as error:  # a broken file is told by as many kinds of errors as there are libraries below
        first = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = f"Download it where there is a network (hf download {model}) and give the folder"
        if Path(model).is_dir():
            remedy = "The folder is not whole: copy or download it again"
        raise CaptionerError(f"cannot load {model}: {first.rstrip('.')}. {remedy}") from error
    if processor.patch_size is None:  # left out in older conversions; prompts would come out with too few image tokens
        processor.patch_size = loaded.config.vision_config.patch_size
        processor.vision_feature_select_strategy = loaded.config.vision_feature_select_strategy
        processor.num_additional_image_tokens = 1  # of a CLIP tower
    return loaded.to(device).requires_grad_(False).eval(), processor


def _stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """Every token that ends an answer, as the checkpoint's generation settings and its tokenizer name them.

    Settings that were only derived from the model's configuration are not asked: where that names no end, its class's
    default, 2, is an ordinary token of Llama 3.
    """
    settings = model.generation_config
    named = [tokenizer.eos_token_id, tokenizer.get_vocab().get(END_OF_TURN)]
    if settings is not None and not getattr(settings, "_from_model_config", False):
        named += settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    return {each for each in named if each is not None}
