"""Train the bundled captioner, a small LLaVA-NeXT, on images whose attributes are measured.

    python nano/train_captioner.py

Needs dataset/{chest-xray,dermoscopy-patches,histology} (prepare.py) and the package llava_next_captioner. First the
tower learns to tell the attributes by itself; then it is frozen, and the rest learns to write descriptions; last, all
learns both. Writes nano/llava-next now and then, and nano/records/llava-next-training.json at the end. Run it again
after an interruption: it goes on from the last save (the optimisers' moments start anew).
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captioner_batches import Attributes, Crops, caption_batch, draw, load_pool
from captioner_model import CARD, build_model, build_processor, build_tokenizer, corpus
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import LlavaNextProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from medart_core.errors import exit_codes
from medart_core.options import Parser

HERE = Path(__file__).resolve().parent
STATE = HERE.parent / "dataset" / ".nano" / "captioner.safetensors"
TARGET = HERE / "llava-next"
OTHERS = {"dermoscopy": 0.5, "histology": 0.35, "photograph": 0.15}  # of the half of a batch that is no X-ray
TOLD_APART = {"chest-xray": 0.6, "dermoscopy": 0.25, "histology": 0.15}  # what the tower's own loss sees in the end
SAVE_EVERY = 100


def optimizers(model: nn.Module, lr: float) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices of the layers, AdamW for the rest."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.ndim == 2 and ".layers." in name]
    chosen = {id(p) for p in matrices}
    others = [p for _, p in named if id(p) not in chosen]
    adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    return torch.optim.Muon(matrices, lr=2 * lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), adamw


def save_state(model: nn.Module, ema: dict[str, torch.Tensor], heads: nn.Module, step: int, seconds: float) -> None:
    STATE.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"now.{name}": p.detach() for name, p in model.named_parameters()}
    tensors |= {f"ema.{name}": p for name, p in ema.items()}
    tensors |= {f"heads.{name}": p.detach() for name, p in heads.named_parameters()}
    save_file(tensors, STATE, metadata={"step": str(step), "seconds": str(seconds)})


def load_state(model: nn.Module, ema: dict[str, torch.Tensor], heads: nn.Module) -> tuple[int, float]:
    """Take up an interrupted training; returns its finished steps and seconds."""
    if not STATE.exists():
        return 0, 0.0
    tensors = load_file(STATE)
    parts = {kind: {k[len(kind) + 1 :]: v for k, v in tensors.items() if k.startswith(f"{kind}.")}
             for kind in ("now", "ema", "heads")}  # fmt: skip
    model.load_state_dict(parts["now"], strict=False)  # the tied output layer is not among the parameters
    heads.load_state_dict(parts["heads"])
    for name in ema:
        ema[name].copy_(parts["ema"][name])
    with safe_open(STATE, "pt") as file:
        return int(file.metadata()["step"]), float(file.metadata()["seconds"])


@torch.no_grad()
def publish(ema: dict[str, torch.Tensor], processor: Any) -> None:
    """Write the averaged weights in bf16 with the processor and the card."""
    averaged = build_model(processor.tokenizer)
    averaged.load_state_dict(ema, strict=False)
    averaged.to(torch.bfloat16).save_pretrained(TARGET)
    processor.save_pretrained(TARGET)
    (TARGET / "card.json").write_text(json.dumps(CARD, indent=2) + "\n")


def losses_of(
    step: int, options: argparse.Namespace, model: Any, heads: Attributes, pool: dict[str, list[Crops]], processor: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """The losses of one step, one after the other: attributes, descriptions, or both by the phase."""
    rng = np.random.default_rng([options.seed, step])
    torch.manual_seed(1_000_003 * options.seed + step)
    phase = phase_of(step, options)[0]
    other = str(rng.choice(list(OTHERS), p=list(OTHERS.values())))
    if phase > 0:
        for domain in ("chest-xray", other):
            batch = caption_batch(processor, draw(pool, domain, options.batch_size, rng), rng)
            yield "xray" if domain == "chest-xray" else "others", model(**batch).loss / 2
    if phase != 1:
        last = str(rng.choice(list(TOLD_APART), p=list(TOLD_APART.values())))
        for domain in ("chest-xray", other) if phase == 0 else (last,):
            loss = heads(model.model.vision_tower, draw(pool, domain, 2 * options.batch_size, rng), domain)
            yield "attributes", loss / 2


def phase_of(step: int, options: argparse.Namespace) -> tuple[int, int, int]:
    """Phase (0 tower, 1 the rest, 2 all), steps done in it, and its length."""
    lengths = (options.tower_steps, options.steps, options.joint_steps)
    for phase, length in enumerate(lengths):
        if step < length or phase == 2:
            return phase, step, length
        step -= length
    raise AssertionError


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--tower-steps", type=int, default=600, help="steps of the tower by itself (default 600)")
    parser.add_argument("--steps", type=int, default=700, help="steps of the rest (default 700)")
    parser.add_argument("--joint-steps", type=int, default=950, help="steps of all together (default 950)")
    parser.add_argument("--batch-size", type=int, default=16, help="X-rays, and as many others, a step (default 16)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default 1e-3, falling to 0)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random (default 0)")
    options = parser.parse_args()
    torch.manual_seed(options.seed)

    if STATE.exists():  # its embeddings belong to that tokenizer
        processor = LlavaNextProcessor.from_pretrained(TARGET)
    else:
        processor = build_processor(build_tokenizer(corpus(6000)))
        processor.save_pretrained(TARGET)
    model = build_model(processor.tokenizer)
    heads = Attributes(model.config.vision_config.hidden_size)
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    first_step, seconds_before = load_state(model, ema, heads)
    pool = load_pool(processor)
    tower = model.model.vision_tower
    trained = (nn.ModuleList([tower, heads]), model, nn.ModuleList([model, heads]))  # by phase

    start, total = time.perf_counter(), options.tower_steps + options.steps + options.joint_steps
    running, steppers, phase = {}, (), -1
    progress = tqdm(range(first_step, total), "captioner", total, initial=first_step, mininterval=30)
    for step in progress:
        before = phase
        phase, done, length = phase_of(step, options)
        if phase != before:
            tower.requires_grad_(phase != 1)
            steppers = optimizers(trained[phase], options.lr)
        fall = min(1, (done + 1) / 100) * min(1, 1.7 * (1 - done / length))  # flat, then linearly to zero
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = options.lr * fall * (2 if isinstance(stepper, torch.optim.Muon) else 1)
        with torch.autocast("cpu", torch.bfloat16):
            for name, loss in losses_of(step, options, model, heads, pool, processor):
                loss.backward()
                running[name] = 0.98 * running.get(name, 2 * loss.item()) + 0.02 * 2 * loss.item()
        torch.nn.utils.clip_grad_norm_(trained[phase].parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
        decay = min(0.995, (1 + done) / (10 + done))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in model.parameters()], 1 - decay)
        progress.set_postfix({name: f"{value:.3f}" for name, value in running.items()}, refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == total:
            seconds = seconds_before + time.perf_counter() - start
            save_state(model, ema, heads, step + 1, seconds)
            if phase > 0:
                publish(ema, processor)
            tqdm.write(f"step {step + 1}  {seconds / 60:.1f} min  loss {running}")
    record(model, options)


def record(model: Any, options: argparse.Namespace) -> None:
    """How it was trained; how good it is says check_captioner.py."""
    with safe_open(STATE, "pt") as file:
        minutes = round(float(file.metadata()["seconds"]) / 60, 1)
    values = {"parameters": sum(p.numel() for p in model.parameters()), "minutes": minutes}
    values |= {
        name: getattr(options, name) for name in ("tower_steps", "steps", "joint_steps", "batch_size", "lr", "seed")
    }
    (HERE / "records" / "llava-next-training.json").write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    with exit_codes():
        main()
