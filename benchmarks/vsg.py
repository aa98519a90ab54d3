"""Time batched captioning from shared prefills beside a plain loop; the last line is one JSON document.

    python benchmarks/vsg.py                           random weights in the bundled captioner's shapes, 5 minutes
    python benchmarks/vsg.py --model nano/llava-next   the bundled captioner instead
    python benchmarks/vsg.py --quick                   a tiny one: a test that everything runs

Both sides hold the same weights and see the same images and prompts, and 30 % of all attempts are rejected, the same
ones on both sides. The loop takes one image at a time through transformers' `generate`, and again for each attempt.
"""

import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import interleave
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from llava_next_captioner.decoding import Sampling
from llava_next_captioner.engines import Answer, Request, stream_seed
from llava_next_captioner.random_weights import byte_processor, random_model
from llava_next_captioner.transformers_engine import TransformersEngine, load
from medart_core.errors import exit_codes
from medart_core.options import Parser

PROMPT = "Describe the colours, outline, surface and surroundings of what this picture shows in fewer than 100 words."
REJECTED, ATTEMPTS = 0.3, 5


def small(quick: bool, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """A LLaVA-NeXT of the bundled captioner's shapes (quick: a smaller one) with random weights, and its processor."""
    side, size, layers = (32, 64, 2) if quick else (80, 192, 5)
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=4, image_size=side,
        patch_size=16,
    )  # fmt: skip
    grid = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    processor = byte_processor(vision, grid)
    text = LlamaConfig(
        vocab_size=1200, hidden_size=size, intermediate_size=512, num_hidden_layers=layers,
        num_attention_heads=size // 32, num_key_value_heads=size // 32, max_position_embeddings=1024,
    )  # fmt: skip
    config = LlavaNextConfig(
        vision_config=vision, text_config=text, image_grid_pinpoints=grid, image_token_index=processor.image_token_id
    )
    model = random_model(config, dtype=dtype, device=device)
    model.lm_head.weight[processor.tokenizer.eos_token_id] = 0  # hardly likely: both sides write to the full length
    return model, processor


def rejected(name: str, attempt: int) -> bool:
    """Whether an attempt is taken to have failed the checks; the last one never is."""
    return attempt + 1 < ATTEMPTS and stream_seed(0, name, attempt) < REJECTED * 2**63


def make_requests(count: int, side: int) -> list[Request]:
    """Smooth random images of a few shapes, with a prompt of some 150 tokens."""
    rng = np.random.default_rng(0)
    shapes = [(2 * side, 2 * side), (2 * side, 3 * side), (3 * side, 2 * side)]
    requests = []
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        requests.append(Request(f"{index}.png", coarse.resize(shapes[index % len(shapes)]), PROMPT))
    return requests


def plain_loop(model: Any, processor: Any, requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
    """As the published code goes about it: batch 1, and the whole prompt again for each attempt."""
    choice: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        choice = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k}
        choice["top_p"] = sampling.top_p
    answers = []
    for request in requests:
        content = [{"type": "image"}, {"type": "text", "text": request.prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=request.image, text=text, return_tensors="pt", add_special_tokens=False)
        inputs = inputs.to(model.device, model.dtype)
        for attempt in range(ATTEMPTS):
            with torch.inference_mode():
                written = model.generate(**inputs, **choice, max_new_tokens=sampling.max_new_tokens)
            new = written[0, inputs["input_ids"].shape[1] :]
            answer = Answer(processor.tokenizer.decode(new, skip_special_tokens=True).strip(), len(new), False)
            if not rejected(request.name, attempt):
                answers.append(answer)
                break
    return answers


def batched(engine: TransformersEngine, requests: Sequence[Request], size: int) -> list[Answer]:
    """As VSG does it: chunks that are made ready in a thread, and what is rejected drawn anew from their prefill."""
    chunks = [requests[start : start + size] for start in range(0, len(requests), size)]
    answers: list[Answer] = []
    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(engine.prepare, chunks[0])]
        for number, names in enumerate(chunks):
            ahead += [pool.submit(engine.prepare, chunk) for chunk in chunks[number + 1 : number + 2]]
            chunk, accepted = ahead[number].result(), {}
            for attempt in range(ATTEMPTS):
                open_ones = [index for index in range(len(names)) if index not in accepted]
                drawn = chunk.sample([(index, attempt) for index in open_ones])
                for index, answer in zip(open_ones, drawn, strict=True):
                    if not rejected(names[index].name, attempt):
                        accepted[index] = answer
            answers += [accepted[index] for index in range(len(names))]
    return answers


def check_answers(model: Any, processor: Any, requests: Sequence[Request], length: int) -> None:
    """Where nothing is left to chance, both sides say the same."""
    greedy = Sampling(temperature=0, max_new_tokens=length)
    expected = plain_loop(model, processor, requests, greedy)
    said = batched(TransformersEngine.of("greedy", model, processor, sampling=greedy), requests, 3)
    if [answer.text for answer in said] != [answer.text for answer in expected]:
        raise SystemExit("the greedy answers of the two sides differ")


def report(cases: dict[str, dict[str, float]], images: int) -> dict[str, float]:
    """Print the cases as a table, add their ratios to the loop of the same precision, and return the best of each."""
    print("| | images/s | median s | min s | CPU s | times faster |\n|---|---|---|---|---|---|")
    best: dict[str, float] = {}
    for case, row in cases.items():
        dtype = case.split(", ")[-1]
        row["images_per_sec"] = round(images / row["seconds_median"], 3)
        row["times_faster"] = round(cases[f"plain loop, {dtype}"]["seconds_median"] / row["seconds_median"], 2)
        best[dtype] = max(best.get(dtype, 0), row["times_faster"])
        keys = ("images_per_sec", "seconds_median", "seconds_min", "cpu_seconds_min", "times_faster")
        print("| " + " | ".join([case, *(str(row[key]) for key in keys)]) + " |")
    return best


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", help="a folder or hub id in place of random weights")
    parser.add_argument("--images", type=int, default=32, help="images captioned in each round (default 32)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default 3)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, 6 images, one round")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if options.quick:
        options.images, options.rounds = 6, 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sampling = Sampling(max_new_tokens=8 if options.quick else 100)
    name = options.model or "random weights"
    cases: dict[str, Callable[[], list[Answer]]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, processor = load(options.model, dtype, device) if options.model else small(options.quick, dtype, device)
        engine = TransformersEngine.of(name, model, processor, sampling=sampling)
        model.generation_config.eos_token_id = engine.stop_ids
        requests = make_requests(options.images, model.config.vision_config.image_size)
        if dtype == torch.float32:
            check_answers(model, processor, requests[:4], sampling.max_new_tokens)
        suffix = str(dtype).removeprefix("torch.")
        cases[f"plain loop, {suffix}"] = partial(plain_loop, model, processor, requests, sampling)
        for size in (1, 8, 32):
            cases[f"chunks of {size}, {suffix}"] = partial(batched, engine, requests, size)
    result = interleave(cases, options.rounds)
    best = report(result, options.images)
    attempts = sum(1 + [rejected(request.name, n) for n in range(ATTEMPTS)].index(False) for request in requests)
    bars = {
        f"captioning in {dtype}, times faster": {"measured": measured, "to_pass": 5, "ambitious": 10}
        for dtype, measured in best.items()
    }
    print()
    for title, bar in bars.items():
        print(f"{title}: {bar['measured']} (to pass {bar['to_pass']}, ambitious {bar['ambitious']})")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    document = {"device": where, "threads": torch.get_num_threads(), "torch": torch.__version__, "model": name}
    document |= {"images": options.images, "attempts": attempts, "rounds": options.rounds, "cases": result}
    print(json.dumps(document | {"bars": bars}))


if __name__ == "__main__":
    with exit_codes():
        main()
