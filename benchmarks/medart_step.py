"""Time an ordinary and an HLDF training step beside a plain baseline; the last line is one JSON document.

    python benchmarks/medart_step.py            thin networks of the published depth, about 15 minutes on 2 cores
    python benchmarks/medart_step.py --levers   and each lever alone, with minutes of compilation
    python benchmarks/medart_step.py --quick    tiny networks: a test that everything runs

Both sides load the same random weights and adapters, and see the same batch, noise and captions of 120 tokens, under
bf16 autocast. They take turns in one process. If their losses differ, the benchmark fails.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import baseline
import ours
from measure import count, interleave
from ours import Work
from thin_pixart import LONG, SHORT, Shape, make_batch, make_trainer, write_pipeline

from diffusers_grad import sampler

Steps = dict[str, Callable[[], tuple]]
SHAPES = {"ordinary": Shape(28, 24, 128, 32), "hldf": Shape(8, 8, 128, 32)}
QUICK = Shape(2, 2, 64, 4)
PUBLISHED_VAE = {"vae_channels": (128, 256, 512, 512), "vae_layers": 2}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02}  # relative difference of the losses


@dataclass(frozen=True)
class Setting:
    """One pipeline folder with its rebuilt twin, and the number of sampling steps M."""

    folder: Path
    rebuilt: Path
    num_inference_steps: int

    def trainer(self, **settings):
        """Our trainer on that pipeline, in bf16 unless said otherwise."""
        return make_trainer(self.folder, settings.pop("dtype", torch.bfloat16), **settings)


def ordinary_steps(setting: Setting, quick: bool) -> Steps:
    """The ordinary step: baseline, the same work by ours, and what further options change."""
    plain, checkpointed = setting.trainer(), setting.trainer(checkpointing=True)
    reference = setting.trainer(checkpointing=True, lean=False)
    batch = make_batch(plain, LONG)
    steps = {
        "baseline": partial(baseline.ordinary_step, reference, batch),
        "ours": partial(ours.ordinary_step, plain, batch, Work()),
        "ours, checkpointed": partial(ours.ordinary_step, checkpointed, batch, Work()),
        "ours, cached latents": partial(ours.ordinary_step, plain, batch, Work(cached_moments=True)),
    }
    if not quick:
        steps["ours, compiled"] = partial(ours.ordinary_step, setting.trainer(compiled=True), batch, Work())
    return steps


def hldf_steps(setting: Setting, quick: bool) -> Steps:
    """The HLDF step: baseline without and with its reloads, and each gradient mode."""
    plain, checkpointed = setting.trainer(), setting.trainer(checkpointing=True)
    reference = setting.trainer(checkpointing=True, lean=False)
    batch = make_batch(plain, LONG)
    pipelines = baseline.make_pipelines(reference, setting.folder)

    def step(trainer, **work) -> Callable[[], tuple]:
        return partial(ours.hldf_step, trainer, batch, Work(**work), setting.num_inference_steps)

    steps = {
        "baseline": partial(baseline.hldf_step, reference, batch, pipelines, setting.num_inference_steps),
        "baseline, pipelines rebuilt": partial(
            baseline.hldf_step, reference, batch, setting.rebuilt, setting.num_inference_steps
        ),
        "ours, full": step(plain),
        "ours, full, steps checkpointed": step(plain, checkpoint_steps=True),
        "ours, full, all checkpointed": step(checkpointed, checkpoint_steps=True),
        **{f"ours, {mode}": step(plain, gradient=mode) for mode in sampler.GRADIENT_MODES[1:-1]},
    }
    if not quick:
        steps["ours, full, compiled"] = step(setting.trainer(compiled=True))
    return steps


def ordinary_levers(setting: Setting) -> Steps:
    """Our step with all levers off, and with each one alone."""
    off = setting.trainer(checkpointing=True, lean=False)
    batch = make_batch(off, LONG)
    step = partial(ours.ordinary_step, batch=batch, work=Work())
    return {
        "none": partial(step, off),
        "lean LoRA": partial(step, setting.trainer(checkpointing=True)),
        "no checkpointing": partial(step, setting.trainer(lean=False)),
        "cached latents": partial(step, off, work=Work(cached_moments=True)),
        "dynamic padding": partial(step, off, batch=make_batch(off, SHORT), work=Work(pad_to=None)),
        "compiled": partial(step, setting.trainer(checkpointing=True, lean=False, compiled=True)),
        "all levers": partial(step, setting.trainer(compiled=True), work=Work(cached_moments=True)),
    }


def hldf_levers(setting: Setting) -> Steps:
    """Our HLDF step with all levers off, and with each one alone."""
    off = setting.trainer(checkpointing=True, lean=False)
    batch = make_batch(off, LONG)
    work = Work(one_text_call=False)
    step = partial(ours.hldf_step, batch=batch, work=work, num_inference_steps=setting.num_inference_steps)
    in_each_step = mock.patch.object(
        sampler, "prompt_arguments", lambda _, prompt_embeds: {"encoder_hidden_states": prompt_embeds}
    )
    without_cache = in_each_step(step)
    return {
        "none": partial(without_cache, off),
        "lean LoRA": partial(without_cache, setting.trainer(checkpointing=True)),
        "no checkpointing": partial(without_cache, setting.trainer(lean=False)),
        "steps checkpointed, not blocks": partial(
            without_cache, setting.trainer(lean=False), work=replace(work, checkpoint_steps=True)
        ),
        "prompt's keys and values once": partial(step, off),
        "one call of T5": partial(without_cache, off, work=Work()),
        "compiled": partial(without_cache, setting.trainer(checkpointing=True, lean=False, compiled=True)),
        "all levers": partial(step, setting.trainer(compiled=True), work=Work()),
    }


def check_losses(steps: Steps, dtype: torch.dtype) -> None:
    """Take each step once, which also warms it up, and compare its losses with those of the first one."""
    expected: list[float] = []
    for name, step in steps.items():
        losses = [float(loss) for loss in step()]
        expected = expected or losses
        if name == "dynamic padding":
            continue  # another caption
        compared = 1 if "one_step" in name else len(losses)  # which decodes an estimate, not the rollout's end
        for loss, reference in list(zip(losses, expected, strict=True))[:compared]:
            if abs(loss - reference) > TOLERANCE[dtype] * abs(reference):
                raise SystemExit(f"{name}: losses {losses} differ from {expected} by more than {TOLERANCE[dtype]}")


def check_in_fp32(setting: Setting) -> None:
    """Where rounding hides nothing, baseline and ours have the same losses."""
    dtype = torch.float32
    reference = setting.trainer(dtype=dtype, checkpointing=True, lean=False)
    batch = make_batch(reference, LONG)
    pipelines = baseline.make_pipelines(reference, setting.folder)
    steps = setting.num_inference_steps
    check_losses(
        {
            "baseline": lambda: baseline.hldf_step(reference, batch, pipelines, steps),
            "ours": lambda: ours.hldf_step(setting.trainer(dtype=dtype), batch, Work(), steps),
        },
        dtype,
    )


def measure(title: str, steps: Steps, rounds: int) -> dict[str, dict[str, float]]:
    """Check, count and time all steps, and print a table of them; the first step is the unit of the ratios."""
    check_losses(steps, torch.bfloat16)
    counts = {}
    for name, step in steps.items():
        if name.endswith(("compiled", "all levers")):  # unseen by the counter, and the second call compiles, too
            step()
            step()
        else:
            counts[name] = count(step)
    times = interleave(steps, rounds)
    result = {name: {**times[name], **counts.get(name, {})} for name in steps}
    unit = next(iter(times.values()))["seconds_median"]
    print(f"\n| {title} | median s | min s | CPU s | times faster | operations | peak MB |")
    print("|---|---|---|---|---|---|---|")
    for name, row in result.items():
        row["times_faster"] = round(unit / row["seconds_median"], 2)
        keys = ("seconds_median", "seconds_min", "cpu_seconds_min", "times_faster", "operations", "peak_mb")
        print("| " + " | ".join([name, *(str(row.get(key, "")) for key in keys)]) + " |", flush=True)
    return result


def bars(ordinary: dict, hldf: dict) -> dict[str, dict[str, float]]:
    """What the project promises for 2 CPU cores, beside what was measured, compiled where that was."""
    step = ordinary.get("ours, compiled", ordinary["ours"])
    exact = hldf.get("ours, full, compiled", hldf["ours, full"])
    reloads = hldf["baseline, pipelines rebuilt"]["seconds_median"] / exact["seconds_median"]
    memory = hldf["ours, full, all checkpointed"]["peak_mb"] / hldf["baseline"]["peak_mb"]
    return {
        "ordinary step, times faster": {"measured": step["times_faster"], "to_pass": 2, "ambitious": 3},
        "HLDF step, times faster": {"measured": exact["times_faster"], "to_pass": 2.5, "ambitious": 4},
        "HLDF step with reloads, times faster": {"measured": round(reloads, 2), "to_pass": 5, "ambitious": 8},
        "HLDF peak memory, share": {"measured": round(memory, 2), "to_pass": 0.7, "ambitious": 0.5},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument("--steps", type=int, default=20, help="DPM-Solver++ steps M (default 20)")
    parser.add_argument("--levers", action="store_true", help="measure each lever alone, too")
    parser.add_argument("--quick", action="store_true", help="tiny networks, M = 3, one round")
    options = parser.parse_args()
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    rounds, num_inference_steps = (1, 3) if options.quick else (options.rounds, options.steps)
    cuda = torch.cuda.is_available()
    document: dict = {"device": torch.cuda.get_device_name() if cuda else "cpu", "threads": torch.get_num_threads()}
    document |= {"torch": torch.__version__, "dtype": "bfloat16", "rounds": rounds, "M": num_inference_steps}
    parts = {"ordinary": (ordinary_steps, ordinary_levers), "hldf": (hldf_steps, hldf_levers)}
    for part, (steps, levers) in parts.items():
        shape = QUICK if options.quick else SHAPES[part]
        with tempfile.TemporaryDirectory() as temporary:
            setting = Setting(Path(temporary) / "thin", Path(temporary) / "rebuilt", num_inference_steps)
            write_pipeline(setting.folder, shape)
            write_pipeline(setting.rebuilt, shape if options.quick else replace(shape, **PUBLISHED_VAE))
            check_in_fp32(setting)
            document[part] = {
                "shape": asdict(shape),
                "steps": measure(f"{part} step", steps(setting, options.quick), rounds),
            }
            if options.levers:
                document[part]["levers"] = measure(f"{part}: one lever", levers(setting), rounds)
    document["bars"] = bars(document["ordinary"]["steps"], document["hldf"]["steps"])
    print()
    for name, bar in document["bars"].items():
        print(f"{name}: {bar['measured']} (to pass {bar['to_pass']}, ambitious {bar['ambitious']})")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
