"""Train a class-conditional DiT (arXiv:2212.09748) on images that extract_features.py has encoded.

    accelerate launch --mixed_precision fp16 train.py --model DiT-XL/2 --features-path /path/to/store/features
    torchrun --nproc_per_node=2 train.py --model DiT-S/4 --data-path dataset/chest-xray/train --vae nano

A run leaves results/NNN-DiT-XL-2 with log.txt, log.jsonl, sample grids and checkpoints/0050000.pt (model, ema, opt,
args), which sample.py --ckpt draws from. To resume, run the same command again. train_options/ has presets.
"""

from medart_core.errors import UserError, exit_codes  # isort: skip (first, for a Ctrl-C while the rest loads)
import os
import shlex
import sys
import time
from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm

from diffusers_grad.attention import attend
from medart_core import checkpoint, devices, dit_checkpoint, dit_data, numbered_runs, stopping
from medart_core.dit_data import Source, training_batches
from medart_core.dit_log import DiTLog, SampleGrids, validation_loss
from medart_core.dit_options import ALIASES, DiTOptions
from medart_core.dit_run import DiTRun, micro_batch_size
from medart_core.gaussian_diffusion import NUM_TIMESTEPS, GaussianDiffusion
from medart_core.objectives import diffusion_loss
from medart_core.options import parse
from medart_core.seeds import SharedDraws
from medart_core.throughput import Throughput
from models import DiT, DiT_models
from train_options import PRESETS

ROOT = Path(__file__).resolve().parent
NOISE = 1  # name of a random stream


def train(run: DiTRun, source: Source, held_out, opts: DiTOptions, state, dtype, max_steps: int, log) -> int:
    """Train from the run's step to `max_steps`; returns 0, or the exit code of the signal that ended it early."""
    device, rank, num_processes, seed = state.device, state.process_index, state.num_processes, opts.global_seed
    rows, shape = opts.global_batch_size // num_processes, source.latent_shape
    at_once = micro_batch_size(run.model, device, rows, opts.micro_batch_size, opts.gradient_accumulation_steps)
    parts = [slice(start, start + at_once) for start in range(0, rows, at_once)]
    diffusion = GaussianDiffusion().to(device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)
    sampler = {"num_steps": opts.num_sampling_steps, "cfg_scale": opts.cfg_scale}
    grids = SampleGrids(source, device, seed, opts.num_samples, **sampler)
    batches = training_batches(source, rows, seed, run.step, rank, num_processes, not opts.no_flip)
    bar = tqdm(initial=run.step, total=max_steps, desc=opts.model, disable=log is None)
    with stopping.StopSignal(say=log is not None) as stop, bar as progress:
        while run.step < max_steps:
            started = time.perf_counter()

            # 1. This process's rows of the step's images and random numbers, which are the same for any number.
            draws = SharedDraws((seed, NOISE, run.step), rows, rank, num_processes, device)
            values, y = (part.to(device, non_blocking=True) for part in next(batches))
            x_start = source.latents(values, draws.normal(*shape))
            noise, t, drop = draws.normal(*shape), draws.integers(NUM_TIMESTEPS), draws.uniform() < opts.class_dropout

            # 2. The loss, noise and variances, in parts that fit the memory; the last part averages the gradients.
            loss = torch.zeros((), device=device)
            for part in parts:
                with run.part(last=part is parts[-1]), autocast:
                    rest = y[part], noise[part], drop[part]
                    losses = diffusion_loss(run.network, diffusion, x_start[part], t[part], *rest)
                    run.scaler.scale(losses.sum() / rows).backward()
                loss += losses.detach().sum() / rows

            # 3. One clipped update of the weights, then of their average.
            figures, ending = run.finish_step(loss, stop.requested)

            if log:
                progress.update()
                log.add(time.perf_counter() - started)
                if run.step % opts.log_every == 0 or run.step == max_steps:
                    log.line(run.step, run.mean_loss(), figures)
                if run.step % opts.ckpt_every == 0 or ending or run.step == max_steps:
                    run.save(opts.keep_ckpts)
                if (opts.sample_every and run.step % opts.sample_every == 0) or run.step == max_steps:
                    with autocast:
                        show(run, diffusion, held_out, opts, grids, log)
            if ending:
                return stop.exit_code
    return 0


def show(run: DiTRun, diffusion, held_out, opts: DiTOptions, grids: SampleGrids, log: DiTLog) -> None:
    """The averaged weights' sample grid and held-out loss."""
    if picture := grids.draw(run.ema.model):
        log.picture(run.step, picture)
    if held_out:
        log.validation(run.step, validation_loss(run.ema.model, diffusion, held_out, opts.max_val_images))


def asked_precision(opts: DiTOptions) -> str:
    """The launcher's word where the options leave it to it."""
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if opts.mixed_precision == "auto":
        return launcher if launcher != "no" else "bf16"
    return opts.mixed_precision or launcher


def build(opts: DiTOptions, source: Source, device: torch.device) -> DiT:
    """The network with its first weights, the same on all processes, or with those of --ckpt."""
    if opts.model not in DiT_models:
        raise UserError(f"there is no model {opts.model!r}; choose from {', '.join(DiT_models)}")
    torch.manual_seed(opts.global_seed)
    channels, side, _ = source.latent_shape
    shape = {"input_size": side, "in_channels": channels, "num_classes": source.num_classes, "qk_norm": opts.qk_norm}
    model = DiT_models[opts.model](**shape)
    if opts.ckpt:
        weights = dit_checkpoint.read(Path(opts.ckpt))
        like = {"image_size": source.image_size, "num_classes": source.num_classes}
        loaded = dit_checkpoint.load(DiT_models, weights, name=opts.model, **like)
        if loaded.state_dict().keys() != model.state_dict().keys():
            how, remedy = ("without", "leave it out") if opts.qk_norm else ("with", "add it")
            raise UserError(f"{opts.ckpt} was trained {how} --qk-norm; {remedy}")
        model.load_state_dict(loaded.state_dict())
    model.set_checkpointing(opts.gradient_checkpointing)
    model.set_attention(attend)
    return model.to(device)


def main(preset: str | None = None, description: str | None = __doc__) -> int:
    opts: DiTOptions = parse(
        DiTOptions, description, presets=PRESETS, preset_option="options", preset=preset, aliases=ALIASES
    )
    stopping.end_with_launcher()
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=2))  # others wait for saves, grids
    device, first, say = torch.device(state.device or "cpu"), state.is_main_process, state.print
    dtype, remark = devices.pick_dtype(asked_precision(opts), device, fp16=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not opts.no_tf32

    # The data and the options are checked before there is a folder.
    results = Path(opts.results_dir) if opts.results_dir else ROOT / "results"
    name, work, held_out = opts.model.replace("/", "-"), [0, 0], None
    with stopping.first_process_first(device):
        if rest := opts.global_batch_size % state.num_processes:
            size, count = opts.global_batch_size, state.num_processes
            raise UserError(
                f"--global-batch-size {size} cannot be shared by {count} processes; give {size - rest or count}"
            )
        like = {"image_size": opts.image_size, "num_classes": opts.num_classes, "vae": opts.vae}
        source = dit_data.open_source(opts.features_path, opts.data_path, device, num_workers=opts.num_workers, **like)
        model = build(opts, source, device)
        max_steps = opts.max_steps or max(1, opts.epochs * len(source) // opts.global_batch_size)
        facts = {"num_images": len(source), "num_classes": source.num_classes, "image_size": source.image_size}
        settings = opts.of_the_run() | facts | {"vae": source.vae, "precision": str(dtype)}
        if first:
            settings["data"] = source.digest()[:16]
            held_out = dit_data.open_held_out(opts.val_path, opts.data_path, device, source)
            work = numbered_runs.choose(results, name, settings, max_steps, opts.fresh)
    number, resumed = stopping.from_first_process(device, *work)
    folder = numbered_runs.folder_of(results, number, name)
    say("\n".join([f"run: {folder}", *([remark] if remark else [])]))

    args = vars(opts) | settings | {"class_names": source.class_names}
    run = DiTRun.start(model, device, dtype, folder, args, **opts.optimizer())
    if resumed:
        run.resume(resumed)
        say(f"resuming from {numbered_runs.file_of(folder, resumed)}")
    if run.step > max_steps:
        raise UserError(f"{folder} is after {run.step} steps, this run ends after {max_steps}; raise --max-steps")
    if opts.compile:
        model.compile_blocks()
    say(
        f"{opts.model}, {sum(p.numel() for p in model.parameters()):,} parameters in {dtype}; {len(source)} images "
        f"({len(held_out) if held_out else 0} held out) of {source.num_classes} classes; "
        f"batch {opts.global_batch_size}: steps {run.step} to {max_steps}"
    )
    with checkpoint.disk_faults(folder), ExitStack() as stack:
        log = None
        if first:
            speed = Throughput(model, device, dtype), opts.global_batch_size, state.num_processes
            log = stack.enter_context(closing(DiTLog(folder, opts.report_to, run.step, *speed)))
        code = train(run, source, held_out, opts, state, dtype, max_steps, log)
        if first and not code:
            checkpoint.finish(folder, run.step)
            file = numbered_runs.file_of(folder, run.step)
            arguments = f"--model {opts.model} --image-size {source.image_size} --ckpt {shlex.quote(str(file))}"
            say(f"finished; try: python sample.py {arguments}")
        elif first:
            say(f"stopped at step {run.step}: checkpoint in {folder}; run the same command again to go on")
    return code


if __name__ == "__main__":
    with exit_codes():
        sys.exit(main())
