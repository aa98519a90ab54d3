"""The transformers engine against stock generation, on a tiny LLaVA-NeXT with random weights."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, T5Config, T5ForConditionalGeneration

from llava_next_captioner import Answer, CaptionerError, Request, TransformersEngine, decoding
from llava_next_captioner.decoding import Sampling, choose, gumbel_noise
from llava_next_captioner.random_weights import PUBLISHED, byte_processor, random_engine, random_model
from llava_next_captioner.shortening import T5Shortener

GRID = [[28, 56], [56, 28], [56, 56]]
SIZES = [(40, 60), (100, 30), (64, 64), (20, 90), (56, 56)]
GREEDY = Sampling(temperature=0, max_new_tokens=24)
PAPER = Sampling(max_new_tokens=24)


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    """Model and processor; a third of the vocabulary ends an answer, so that rows stop at different times."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    processor = byte_processor(vision, GRID)
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    config = LlavaNextConfig(
        vision_config=vision, text_config=text, image_grid_pinpoints=GRID, image_token_index=processor.image_token_id
    )
    model = random_model(config)
    model.generation_config.eos_token_id = list(range(0, len(processor.tokenizer), 12))
    model.generation_config._from_model_config = False
    return model, processor


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in SIZES]
    return [Request(f"{i}.png", image, "Look " + "closely " * i) for i, image in enumerate(images)]


def engine(tiny: tuple[Any, Any], sampling: Sampling = PAPER, seed: int = 7, **settings) -> TransformersEngine:
    return TransformersEngine.of("tiny", *tiny, seed=seed, sampling=sampling, **settings)


def each(requests: list[Request], attempts: int = 1) -> list[tuple[int, int]]:
    return [(index, attempt) for index in range(len(requests)) for attempt in range(attempts)]


@pytest.mark.parametrize("prefix", ["", "A chest X-ray image"])
def test_greedy_answers_are_those_of_stock_generation(tiny, requests, prefix: str) -> None:
    model, processor = tiny
    asked = [Request(request.name, request.image, request.prompt, prefix) for request in requests]
    answers = engine(tiny, GREEDY, prefill_batch=2).prepare(asked).sample(each(asked))
    for request, answer in zip(asked, answers, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": request.prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        made = processor(images=request.image, text=text + prefix, return_tensors="pt", add_special_tokens=False)
        new = model.generate(**made, do_sample=False, max_new_tokens=24)[0, made["input_ids"].shape[1] :].tolist()
        finished = new[-1] in model.generation_config.eos_token_id
        expected = prefix + processor.tokenizer.decode(new, skip_special_tokens=True)
        assert answer == Answer(expected.strip(), len(new), finished)
    assert len({answer.tokens for answer in answers}) > 1  # or nothing is said about rows that stop


def test_one_prefill_serves_all_attempts(tiny, requests, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = engine(tiny).prepare(requests)
    together = shared.sample(each(requests, 3))
    apart = [engine(tiny).prepare([requests[index]]).sample([(0, attempt)])[0] for index, attempt in each(requests, 3)]
    assert together == apart
    assert shared.sample([(3, 2), (0, 1), (3, 0)]) == [together[11], together[1], together[9]]
    assert shared.sample([]) == []
    monkeypatch.setitem(decoding.LOOK_EVERY, "cpu", 8)  # as on a GPU
    assert shared.sample(each(requests, 3)) == together
    assert len({answer.text for answer in together}) == len(together)
    assert len({answer.tokens for answer in together}) > 3 and {answer.finished for answer in together} == {
        True,
        False,
    }


def test_a_full_gpu_is_one_line(tiny, requests, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 2 GiB")

    full_engine = engine(tiny)
    monkeypatch.setattr(full_engine, "_prefill", full)
    with pytest.raises(CaptionerError, match="too small for 5 images at a time: take fewer"):
        full_engine.prepare(requests).sample(each(requests))


def test_noise_follows_seed_and_name(tiny, requests) -> None:
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(engine(tiny).prepare, requests).result().sample(each(requests))
    assert ahead == engine(tiny).prepare(requests).sample(each(requests))
    assert ahead != engine(tiny, seed=8).prepare(requests).sample(each(requests))
    renamed = [Request("other.png", request.image, request.prompt) for request in requests]
    assert ahead != engine(tiny).prepare(renamed).sample(each(requests))
    named = [(7, "a", 0), (7, "a", 1), (8, "a", 0), (7, "b", 0), (7, "\udcff", 0)]
    assert len({gumbel_noise(*name, PAPER)[0, 0].item() for name in named}) == len(named)


def test_choices_have_the_probabilities_of_top_k_and_top_p() -> None:
    draws = 4000
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0, 2.5]).expand(draws, -1)
    sampling = Sampling(temperature=0.5, top_k=4, top_p=0.95)
    noise = -torch.log(-torch.log(torch.rand(draws, 4, generator=torch.Generator().manual_seed(0))))
    share = torch.bincount(choose(logits, noise, sampling), minlength=6) / draws
    # Token 2 is among the four likeliest, but 1, 5 and 3 make up 98 % of them.
    kept = torch.tensor([-torch.inf, 3.0, -torch.inf, 2.0, -torch.inf, 2.5])
    assert (share - torch.softmax(kept / 0.5, 0)).abs().max() < 0.03 and share[2] == share[0] == 0
    assert (choose(logits, noise, Sampling(top_p=1e-6, top_k=4)) == 1).all()


def test_the_prompt_holds_one_bos_and_one_image(tiny, requests) -> None:
    _, processor = tiny
    hostile = Request("a.png", requests[0].image, "What <image> is <ima<image>ge>?", "<image>A")
    template = processor.chat_template
    try:
        for text in (template, template.replace("{{ bos_token }}", "")):
            processor.chat_template = text
            (inputs,) = engine(tiny).prepare([hostile])._inputs
            assert (inputs.ids == processor.tokenizer.bos_token_id).sum() <= 1
            assert "What   is <ima ge>?" in processor.tokenizer.decode(inputs.ids)
            (plain,) = engine(tiny).prepare([Request("b.png", hostile.image, "What   is <ima ge>?", " A")])._inputs
            assert torch.equal(plain.ids, inputs.ids)
        processor.chat_template = None
        with pytest.raises(CaptionerError, match="no chat template"):
            engine(tiny)
    finally:
        processor.chat_template = template


def test_engine_from_a_folder(tiny, requests, tmp_path: Path) -> None:
    for part in tiny:
        part.save_pretrained(tmp_path / "tiny")
    loaded = TransformersEngine(str(tmp_path / "tiny"), seed=7, max_new_tokens=24, device="cpu")
    assert loaded.model.endswith("tiny")
    assert loaded.prepare(requests).sample(each(requests)) == engine(tiny).prepare(requests).sample(each(requests))
    half = TransformersEngine(str(tmp_path / "tiny"), dtype=torch.bfloat16, device="cpu", max_new_tokens=3)
    assert [answer.tokens <= 3 for answer in half.prepare(requests).sample(each(requests))] == [True] * len(requests)

    T5Config().save_pretrained(tmp_path / "t5")
    shutil.copytree(tmp_path / "tiny", tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "model.safetensors", 5000)
    for model, settings, message in [
        (tmp_path / "absent", {}, "cannot load .*hf download"),
        (tmp_path / "cut", {}, "cannot load .*copy or download it again"),
        (tmp_path / "t5", {}, "is a model of kind t5"),
        (tmp_path / "tiny", {"attn": "eager"}, "choose from sdpa"),
        (tmp_path / "tiny", {"top_k": 0}, "top_k is 0"),
        (tmp_path / "tiny", {"top_p": 0.0}, "top_p"),
    ]:
        with pytest.raises(CaptionerError, match=message) as error:
            TransformersEngine(str(model), device="cpu", **settings)
        assert "\n" not in str(error.value)


def test_published_shapes(tiny, requests, monkeypatch: pytest.MonkeyPatch) -> None:
    published = PUBLISHED["llama3-llava-next-8b"]
    model = random_model(LlavaNextConfig(**published), dtype=torch.bfloat16, device="meta")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == 8_030_261_248 + 64 * 2 * 4096 + 303_507_456 + (1024 + 1 + 4096 + 1) * 4096 + 4096
    assert round(count / 1e9, 2) == 8.36
    with pytest.raises(CaptionerError, match="choose from llama3-llava-next-8b"):
        random_engine("llama4")
    config = tiny[0].config
    shapes = {name: getattr(config, name) for name in ("text_config", "vision_config", "image_grid_pinpoints")}
    monkeypatch.setitem(PUBLISHED, "tiny", shapes)
    same, other = (random_engine("tiny", seed=seed, sampling=Sampling(max_new_tokens=5)) for seed in (0, 1))
    assert same.model == "random-weights/tiny" and same._loaded.dtype == torch.bfloat16
    pairs = zip(same._loaded.parameters(), tiny[0].parameters(), strict=True)
    assert all(ours.isfinite().all() and ours.shape == theirs.shape for ours, theirs in pairs)
    assert [answer.tokens for answer in same.prepare(requests).sample(each(requests))] == [5] * len(requests)
    assert not torch.equal(same._loaded.lm_head.weight, other._loaded.lm_head.weight)


def test_t5_shortener(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "nano/pixart/tokenizer")
    tokenizer.save_pretrained(tmp_path)
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0  # pyright: ignore[reportAttributeAccessIssue]
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    shortener = T5Shortener(str(tmp_path))
    seen: list[str] = []
    assert shortener("A long text.", lambda text: not seen.append(text)) == seen[0]
    assert shortener("A long text.", lambda text: False) is None
    with pytest.raises(CaptionerError, match="cannot load the shortener"):
        T5Shortener(str(tmp_path / "absent"))("A long text.", bool)
