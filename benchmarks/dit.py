"""Time DiT's training step, its parts, sampling and the .npz beside a plain baseline; the last line is JSON.

    python benchmarks/dit.py                    DiT-S/2 at 256 px, batch 4: about 15 minutes on 2 cores
    python benchmarks/dit.py --only step npz    some of the parts
    python benchmarks/dit.py --quick            small networks and one round: a test that everything runs

Both sides have the same weights and see the same images, noise and timesteps; their losses, samples and archives are
compared, and the benchmark fails where they differ. They take turns in one process.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dit_baseline as baseline
import dit_npz
from measure import interleave

from diffusers_grad.attention import attend
from medart_core import devices, dit_data, feature_store
from medart_core.dit_run import DiTRun
from medart_core.dit_sampling import sample_latents
from medart_core.errors import exit_codes
from medart_core.feature_store import FeatureStore
from medart_core.gaussian_diffusion import GaussianDiffusion
from medart_core.labelled_images import LabelledImages
from medart_core.objectives import diffusion_loss
from medart_core.options import Parser
from models import DiT, DiT_models

Cases = dict[str, Callable[[], object]]
BATCH, SIDE, LOADED, STORED, CFG = 4, 32, 128, 2048, 4.0
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02}
# Part -> (what is measured, the row held against its baseline, that baseline, to pass, ambitious).
BARS = {
    "step": [("ours, bf16, compiled", "baseline, bf16", 1.7, 2.5), ("ours, bf16, compiled", "baseline, fp32", 3, 4.5)],
    "update": [("ours", "baseline", 2.3, 3.5)],
    "loader": [("ours", "baseline", 40, 60)],
    "sampler": [("ours, bf16, compiled", "baseline, fp32", 2.5, 5)],
    "npz": [("ours", "baseline, fsynced", 100, 500), ("ours, not fsynced", "baseline", 100, 500)],
}


def make_model(quick: bool, dtype: torch.dtype = torch.float32) -> DiT:
    """The same random weights at every call; those that begin at zero are drawn, too, or the loss would be trivial."""
    torch.manual_seed(0)
    model = DiT(SIDE, hidden_size=64, depth=2, num_heads=2) if quick else DiT_models["DiT-S/2"](input_size=SIDE)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model.to(dtype)


def autocast(dtype: torch.dtype) -> torch.autocast:
    """Autocast to 16 bits, or none."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16)


class OurTrainer:
    """What train.py does in a step."""

    def __init__(self, model: DiT, dtype: torch.dtype = torch.float32, compiled: bool = False):
        rates: dict[str, Any] = {"learning_rate": 1e-4, "weight_decay": 0.0, "warmup_steps": 0, "max_grad_norm": None}
        average = {"ema_decay": baseline.EMA_DECAY, "no_ema_warmup": True}
        model.set_attention(attend)
        self.run = DiTRun.start(model, torch.device("cpu"), dtype, Path(), {}, **rates, **average)
        self.diffusion, self.autocast = GaussianDiffusion(), autocast(dtype)
        if compiled:
            model.compile_blocks()

    def step(self, x_start: Tensor, t: Tensor, y: Tensor, noise: Tensor, drop: Tensor) -> float:
        """One update; returns the loss."""
        with self.run.part(last=True), self.autocast:
            loss = diffusion_loss(self.run.network, self.diffusion, x_start, t, y, noise, drop).mean()
            loss.backward()
        self.run.finish_step(loss.detach(), stop=False)
        return self.run.mean_loss()


def step_cases(quick: bool, _: Path) -> Cases:
    """A training step, each side on a model of its own; losses are compared over three steps."""
    draws = torch.Generator().manual_seed(1)
    x_start, noise = (torch.randn(BATCH, 4, SIDE, SIDE, generator=draws) for _ in range(2))
    t, y = (torch.randint(1000, (BATCH,), generator=draws) for _ in range(2))
    batch = x_start, t, y, noise, torch.arange(BATCH) == 0
    fp32, bf16 = torch.float32, torch.bfloat16
    trainers: dict[str, tuple[Any, torch.dtype]] = {
        "baseline, fp32": (baseline.Trainer(make_model(quick)), fp32),
        "baseline, bf16": (baseline.Trainer(make_model(quick), autocast(bf16)), bf16),
        "ours, fp32": (OurTrainer(make_model(quick)), fp32),
        "ours, bf16": (OurTrainer(make_model(quick), bf16), bf16),
        "ours, bf16, compiled": (OurTrainer(make_model(quick), bf16, compiled=not quick), bf16),
    }
    expected: list[float] = []
    for name, (trainer, dtype) in trainers.items():
        losses = [trainer.step(*batch) for _ in range(3)]
        expected = expected or losses
        print(f"losses of three steps, {name}: {', '.join(f'{loss:.5f}' for loss in losses)}", flush=True)
        if not np.allclose(losses, expected, rtol=TOLERANCE[dtype]):
            raise SystemExit(f"{name}: losses {losses} differ from {expected} by more than {TOLERANCE[dtype]}")
    return {name: partial(trainer.step, *batch) for name, (trainer, _) in trainers.items()}


def update_cases(quick: bool, _: Path) -> Cases:
    """AdamW and the average of the weights on the same gradients."""
    theirs, ours = baseline.Trainer(make_model(quick)), OurTrainer(make_model(quick)).run
    for model in (theirs.model, ours.model):
        torch.manual_seed(2)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None

    def update() -> None:
        ours.optimizer.step()
        ours.ema.update(10**6)

    theirs.update()
    update()
    for mine, other in ((ours.model, theirs.model), (ours.ema.model, theirs.ema)):
        for a, b in zip(mine.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    return {"baseline": theirs.update, "ours": update}


def loader_cases(quick: bool, folder: Path) -> Cases:
    """One pass over shuffled latents of 256 px images; ours draw a mirror image or not, and keep the moments."""
    count = 256 if quick else STORED
    baseline.write_files(folder / "files", count, SIDE)
    names = [f"files/features/{number}.npy" for number in range(count)]
    images = LabelledImages(folder, names, [number % 1000 for number in range(count)], [str(n) for n in range(1000)])
    facts = {"vae": "none", "image_size": SIDE * 8, "scaling_factor": 0.18215}
    feature_store.begin(folder / "store", images, facts, (count, 2, 2, 4, SIDE, SIDE))
    extraction = feature_store.Extraction(folder / "store")
    for group in extraction.pending():
        extraction.write(group, torch.rand(feature_store.GROUP, 2, 2, 4, SIDE, SIDE))
    extraction.flush()
    extraction.publish()
    batches = dit_data.training_batches(
        dit_data.StoredMoments(FeatureStore(folder / "store")), LOADED, 0, 0, 0, 1, True
    )
    files = baseline.loader(folder / "files", LOADED)
    return {
        "baseline": lambda: sum(len(labels) for _, labels in files),
        "ours": lambda: sum(len(next(batches)[1]) for _ in range(count // LOADED)),
    }


def sampler_cases(quick: bool, _: Path) -> Cases:
    """Guided ancestral sampling of 4 images in 10 steps, from the same noise; in fp32 they must be the same."""
    steps, labels = 10, torch.tensor([207, 360, 387, 974])

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(BATCH)]

    def noises() -> list[Tensor]:
        draws, shape = generators(), (1, 4, SIDE, SIDE)
        return [torch.cat([torch.randn(shape, generator=draw) for draw in draws]) for _ in range(steps + 1)]

    def ours(model: DiT) -> Tensor:
        return sample_latents(model, labels, generators(), sampler="ddpm", num_steps=steps, cfg_scale=CFG)

    models = {name: make_model(quick, dtype).eval().requires_grad_(False) for name, dtype in
              (("fp32", torch.float32), ("bf16", torch.bfloat16), ("bf16, compiled", torch.bfloat16))}  # fmt: skip
    plain = make_model(quick).eval()
    plain.set_checkpointing("full")
    expected = baseline.sample(plain, labels, noises(), CFG)
    difference = (ours(models["fp32"]) - expected).norm() / expected.norm()
    print(f"samples in fp32 differ by {difference:.1e} of their norm", flush=True)
    if difference > 1e-3:
        raise SystemExit("the samples differ")
    for model in models.values():
        model.set_attention(attend)
    if not quick:
        models["bf16, compiled"].compile_blocks()
        ours(models["bf16, compiled"])
    cases: Cases = {f"ours, {name}": partial(ours, model) for name, model in models.items()}
    return {"baseline, fp32": lambda: baseline.sample(plain, labels, noises(), CFG), **cases}


PARTS = {
    "step": step_cases,
    "update": update_cases,
    "loader": loader_cases,
    "sampler": sampler_cases,
    "npz": dit_npz.cases,
}


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default 9; a third of them for npz)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts (default: all)")
    parser.add_argument("--quick", action="store_true", help="small networks, one round")
    options = parser.parse_args()
    native = devices.bf16_is_native(torch.device("cpu"))
    document: dict[str, Any] = {"device": "cpu", "threads": torch.get_num_threads(), "torch": torch.__version__}
    document |= {"bf16_is_native": native, "rounds": 1 if options.quick else options.rounds, "parts": {}, "bars": {}}
    for part in options.only:
        with tempfile.TemporaryDirectory() as folder:
            cases = PARTS[part](options.quick, Path(folder))
            rounds = 1 if options.quick else max(3, options.rounds // 3) if part == "npz" else options.rounds
            times = document["parts"][part] = interleave(cases, rounds)
        print(f"\n| {part} | median s | min s | CPU s |\n|---|---|---|---|")
        for name, row in times.items():
            print("| " + " | ".join([name, *map(str, row.values())]) + " |", flush=True)
        for ours, theirs, to_pass, ambitious in BARS[part]:
            ratio = round(times[theirs]["seconds_median"] / times[ours]["seconds_median"], 2)
            bar = {"measured": ratio, "to_pass": to_pass, "ambitious": ambitious}
            document["bars"][f"{part}: {ours} against {theirs}"] = bar
            print(f"{ours} against {theirs}: {ratio} (to pass {to_pass}, ambitious {ambitious})", flush=True)
    print(json.dumps(document))


if __name__ == "__main__":
    with exit_codes():
        main()
