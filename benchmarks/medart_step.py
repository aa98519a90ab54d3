"""Time an ordinary and an HLDF training step beside a plain baseline; the last line is one JSON document.

    python benchmarks/medart_step.py            thin networks of the published depth, about 15 minutes on 2 cores
    python benchmarks/medart_step.py --levers   and each lever alone, with minutes of compilation
    python benchmarks/medart_step.py --quick    tiny networks: a test that everything runs

Both sides load the same random weights and adapters, and see the same batch, noise and captions of 120 tokens, under
bf16 autocast. They take turns in one process. If their losses differ, the benchmark fails.
"""

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

from diffusers_grad import attention, sampler
from medart_core.errors import exit_codes
from medart_core.options import Parser

Steps = dict[str, Callable[[], tuple]]
SHAPES = {"ordinary": Shape(28, 24, 128, 32), "hldf": Shape(8, 8, 128, 32)}
QUICK = Shape(2, 2, 64, 4)
PUBLISHED_VAE = {"vae_channels": (128, 256, 512, 512), "vae_layers": 2}
STOCK: dict[str, bool] = {"checkpointing": True, "lean": False, "own_attention": False}  # the baseline's layers
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
    reference = setting.trainer(**STOCK)
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
    reference = setting.trainer(**STOCK)
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
        "ours, full, adapters apart": step(plain, merge_lora=False),
        "ours, full, steps checkpointed": step(plain, checkpoint_steps=True),
        "ours, full, all checkpointed": step(checkpointed, checkpoint_steps=True, merge_lora=False),
        **{f"ours, {mode}": step(plain, gradient=mode) for mode in sampler.GRADIENT_MODES[1:-1]},
    }
    if not quick:
        steps["ours, full, compiled"] = step(setting.trainer(compiled=True))
    return steps


def ordinary_levers(setting: Setting) -> Steps:
    """Our step with all levers off, and with each one alone."""
    off = setting.trainer(**STOCK)
    batch = make_batch(off, LONG)
    step = partial(ours.ordinary_step, batch=batch, work=Work())
    return {
        "none": partial(step, off),
        "lean LoRA": partial(step, setting.trainer(**STOCK | {"lean": True})),
        "plain attention": partial(step, setting.trainer(**STOCK | {"own_attention": True})),
        "no checkpointing": partial(step, setting.trainer(**STOCK | {"checkpointing": False})),
        "cached latents": partial(step, off, work=Work(cached_moments=True)),
        "dynamic padding": partial(step, off, batch=make_batch(off, SHORT), work=Work(pad_to=None)),
        "compiled": partial(step, setting.trainer(**STOCK, compiled=True)),
        "all levers": partial(step, setting.trainer(compiled=True), work=Work(cached_moments=True)),
    }


def hldf_levers(setting: Setting) -> Steps:
    """Our HLDF step with all levers off, and with each one alone, but merging, which needs the lean layers."""
    off = setting.trainer(**STOCK)
    batch = make_batch(off, LONG)
    work = Work(one_text_call=False, merge_lora=False)
    step = partial(ours.hldf_step, batch=batch, work=work, num_inference_steps=setting.num_inference_steps)
    read_each_time = mock.patch.object(sampler, "prompt_arguments", lambda _, read: {"encoder_hidden_states": read})
    fused_kernel = mock.patch.object(attention, "KEPT_SCORES", 0)
    without_cache = read_each_time(step)
    none = fused_kernel(read_each_time(step))  # a second patch of `without_cache` would change that one
    return {
        "none": partial(none, off),
        "lean LoRA": partial(none, setting.trainer(**STOCK | {"lean": True})),
        "lean LoRA, merged": partial(none, setting.trainer(checkpointing=True), work=replace(work, merge_lora=True)),
        "plain attention": partial(without_cache, setting.trainer(**STOCK | {"own_attention": True})),
        "no checkpointing": partial(none, setting.trainer(**STOCK | {"checkpointing": False})),
        "steps checkpointed, not blocks": partial(
            none, setting.trainer(**STOCK | {"checkpointing": False}), work=replace(work, checkpoint_steps=True)
        ),
        "prompt's keys and values once": partial(fused_kernel(step), off),
        "one call of T5": partial(none, off, work=replace(work, one_text_call=True)),
        "compiled": partial(none, setting.trainer(**STOCK, compiled=True)),
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
    reference = setting.trainer(dtype=dtype, **STOCK)
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
    unit = next(iter(times.values()))
    print(f"\n| {title} | median s | CPU s | times faster | by CPU s | operations | peak MB |")
    print("|---|---|---|---|---|---|---|")
    for name, row in result.items():
        row["times_faster"] = round(unit["seconds_median"] / row["seconds_median"], 2)
        row["times_faster_cpu"] = round(unit["cpu_seconds_min"] / row["cpu_seconds_min"], 2)
        keys = ("seconds_median", "cpu_seconds_min", "times_faster", "times_faster_cpu", "operations", "peak_mb")
        print("| " + " | ".join([name, *(str(row.get(key, "")) for key in keys)]) + " |", flush=True)
    return result


def bars(ordinary: dict, hldf: dict) -> dict[str, dict[str, float]]:
    """What the project promises for 2 CPU cores, beside what was measured, compiled where that was.

    CPU seconds tell the same where other work disturbs the wall clock, less exactly.
    """

    def times_faster(reference: dict, ours: dict, to_pass: float, ambitious: float) -> dict[str, float]:
        wall, cpu = (round(reference[key] / ours[key], 2) for key in ("seconds_median", "cpu_seconds_min"))
        return {"measured": wall, "by_cpu_seconds": cpu, "to_pass": to_pass, "ambitious": ambitious}

    step = ordinary.get("ours, compiled", ordinary["ours"])
    exact = hldf.get("ours, full, compiled", hldf["ours, full"])
    memory = hldf["ours, full, all checkpointed"]["peak_mb"] / hldf["baseline"]["peak_mb"]
    return {
        "ordinary step, times faster": times_faster(ordinary["baseline"], step, 2, 3),
        "HLDF step, times faster": times_faster(hldf["baseline"], exact, 2.5, 4),
        "HLDF step with reloads, times faster": times_faster(hldf["baseline, pipelines rebuilt"], exact, 5, 8),
        "HLDF peak memory, share": {"measured": round(memory, 2), "to_pass": 0.7, "ambitious": 0.5},
    }


def main() -> None:
    parser = Parser(description=__doc__)
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
            timed = measure(f"{part} step", steps(setting, options.quick), rounds)
            document[part] = {"shape": asdict(shape), "steps": timed}
            if options.levers:
                document[part]["levers"] = measure(f"{part}: one lever", levers(setting), rounds)
    document["bars"] = bars(document["ordinary"]["steps"], document["hldf"]["steps"])
    print()
    for name, bar in document["bars"].items():
        print(f"{name}: {bar['measured']} (to pass {bar['to_pass']}, ambitious {bar['ambitious']})")
    print(json.dumps(document))


if __name__ == "__main__":
    with exit_codes():
        main()
