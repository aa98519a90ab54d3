"""Fine-tune PixArt-alpha on captioned medical images: LoRA on the transformer and on T5, with HLDF.

    python medart.py                      the bundled model on chest X-rays, prepared when absent
    accelerate launch --mixed_precision=bf16 medart.py \\
        --pretrained_model_name_or_path=PixArt-alpha/PixArt-XL-2-512x512 --dataset_name=dataset/kvasir/train \\
        --resolution=512 --rank=8 --learning_rate=1e-4 --use_8bit_adam --gradient_checkpointing --N_steps=500

Hybrid-Level Diffusion Fine-tuning (Med-Art, arXiv:2506.20449): besides the noise-prediction loss of every step, at
every N-th step an image is sampled through M DPM-Solver++ steps and decoded, its colour statistics are held against a
real image of the same caption, and that loss is backpropagated through the VAE decoder and the whole rollout.
To resume, run the same command again.
"""

from medart_core.errors import UserError, exit_codes  # isort: skip (first, for a Ctrl-C while the rest loads)
import math
import os
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from shlex import quote

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from diffusers import DDPMScheduler
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffusers_grad import decode_latents, sample_latents
from medart_core import (
    checkpoint,
    compilation,
    data,
    devices,
    full_size,
    latents,
    lora_layers,
    plan,
    pretrained,
    stopping,
    text_cache,
    trainable,
    training_data,
)
from medart_core.denoising import denoising_loss, validation_loss
from medart_core.lean_lora import merged
from medart_core.medart_options import FREE_ON_RESUME, MedArtOptions, image_sides
from medart_core.objectives import COLOR_LOSSES, color_report
from medart_core.options import parse
from medart_core.overlay import content_mask
from medart_core.pretrained import PixArt
from medart_core.run import Run
from medart_core.runlog import RunLog
from medart_core.seeds import SharedDraws
from medart_core.text import encode_with_negative, report_long_captions

ROOT = Path(__file__).resolve().parent
NOISE, ROLLOUT = 1, 2  # names of the random streams


def sample_with_gradient(model: PixArt, captions: list[str], size, draws: SharedDraws, opts: MedArtOptions) -> Tensor:
    """Images of the captions from fresh noise, (B, 3, H, W) in about [-1, 1], with the graph of the whole rollout."""
    noise = draws.normal(model.transformer.config.in_channels, *(side // model.vae_scale_factor for side in size))
    sampled = sample_latents(
        model.transformer,
        model.scheduler,
        noise.to(model.vae.device),
        *encode_with_negative(model.tokenizer, model.text_encoder, captions, "", opts.max_token_length),
        num_inference_steps=opts.M_times,
        guidance_scale=opts.hldf_guidance_scale,
        gradient=opts.hldf_gradient,
        k=opts.hldf_k,
        checkpoint_steps=opts.hldf_checkpointing == "nested",
        generator=draws.generator,
    )
    return decode_latents(model.vae, sampled, checkpointing=opts.hldf_checkpointing == "nested")


def color_gradient(model: PixArt, batch: dict, dataset, draws: SharedDraws, parameters, accelerator, opts) -> dict:
    """HLDF: add the colour loss's gradient to the adapters', and return what the log keeps of it.

    Raises UserError if the loss has no gradient, so that HLDF can never be inactive without a word.
    """
    captions, keys = (batch[name][: opts.hldf_batch_size] for name in ("captions", "keys"))
    real = torch.stack([dataset.pixel_values(key) for key in keys]).to(model.vae.device)
    before = lora_layers.gradients(parameters)
    pretrained.set_gradient_checkpointing(model, opts.hldf_checkpointing != "none")
    with merged(model.transformer, opts.hldf_merge_lora):
        with accelerator.autocast():
            generated = sample_with_gradient(model, opts.repeated(captions), real.shape[-2:], draws, opts)
        masks = [content_mask(images) for images in (generated, real)] if opts.mask_overlay else []
        loss = COLOR_LOSSES[opts.color_loss](generated, real, *masks)
        weight = 1 / opts.M_times if opts.color_loss_weight is None else opts.color_loss_weight
        if loss.requires_grad:
            (weight * loss).backward()
    pretrained.set_gradient_checkpointing(model, opts.gradient_checkpointing)
    grad_norm = lora_layers.gradients(parameters).sub_(before).norm()
    if grad_norm == 0:
        raise UserError("the colour loss carries no gradient, HLDF would do nothing; take the sampler out of no_grad")
    return {"loss_color": loss.detach(), "grad_norm_hldf": grad_norm, **color_report(generated, real, *masks)}


def show(model: PixArt, noise_scheduler, held_out, step: int, log: RunLog, accelerator: Accelerator, opts) -> None:
    """The sample grid and the validation loss after `step` steps."""
    with accelerator.autocast():
        log.grid(model, step)
        if held_out:
            log.validation(step, validation_loss(model, noise_scheduler, held_out, opts.max_token_length))


def train(opts: MedArtOptions, accelerator: Accelerator, run: Run, dataset, held_out, max_steps: int, log) -> int:
    """Train from the run's step to `max_steps`; returns 0, or the exit code of the signal that ended it early."""
    model, rank, num_processes = run.model, accelerator.process_index, accelerator.num_processes
    window, batch_size = opts.gradient_accumulation_steps, opts.train_batch_size
    noise_scheduler = DDPMScheduler.from_config(model.scheduler.config)
    settings = opts.part("loss")
    stream = data.ShuffledBatches(len(dataset), batch_size, opts.seed, run.step * window, rank, num_processes)
    loading = {"num_workers": opts.dataloader_num_workers, "worker_init_fn": stopping.leave_process_group}
    batches = iter(DataLoader(dataset, batch_sampler=stream, collate_fn=data.collate, **loading))
    if log and run.step == 0:
        show(model, noise_scheduler, held_out, 0, log, accelerator, opts)
    bar = tqdm(initial=run.step, total=max_steps, desc="medart", disable=log is None)
    with stopping.StopSignal(say=log is not None) as stop, bar as progress:
        for step in range(run.step, max_steps):
            started = time.perf_counter()

            # 1. Noise prediction: one backward per micro-batch.
            draws = SharedDraws((opts.seed, NOISE, step), batch_size, rank, num_processes)
            parts = []
            for _ in range(window):
                batch = next(batches)
                with accelerator.autocast():
                    loss = denoising_loss(model, noise_scheduler, batch, draws, **settings) / window
                loss.backward()
                parts.append(("noise loss", loss.detach(), dataset.sources(batch)))
            entry = {"loss_noise": torch.stack([loss for _, loss, _ in parts]).sum()}

            # 2. HLDF at every N-th step: the colours of a sampled image, through the decoder and all M steps.
            if not opts.no_hldf and step % opts.N_steps == 0:
                draws = SharedDraws((opts.seed, ROLLOUT, step), opts.hldf_images, rank, num_processes)
                entry |= color_gradient(model, batch, dataset, draws, run.parameters, accelerator, opts)
                parts.append(("colour loss", entry["loss_color"], dataset.sources(batch)[: opts.hldf_batch_size]))

            # 3. One synchronisation of the gradients, one clipped update.
            ending = run.average_gradients(parts, stop.requested, rank)
            entry["grad_norm"] = torch.nn.utils.clip_grad_norm_(run.parameters, opts.max_grad_norm)
            run.update()

            if log:
                progress.update()
                log.add(step, entry, time.perf_counter() - started, run.lr, progress)
                if run.step % opts.checkpointing_steps == 0 or ending or run.step == max_steps:
                    run.save(opts.checkpoints_total_limit)
                if opts.validation_steps and run.step % opts.validation_steps == 0 and run.step < max_steps:
                    show(model, noise_scheduler, held_out, run.step, log, accelerator, opts)
            if ending:
                return stop.exit_code
    if log:
        show(model, noise_scheduler, held_out, max_steps, log, accelerator, opts)
    return 0


def dry_run(opts, accelerator: Accelerator, run: Run, dataset, max_steps: int, hldf_updates: int) -> int:
    """Measure 3 ordinary steps and 1 with HLDF after a first one that warms up, print them, and write nothing."""
    timed = plan.TimedRun(**vars(run))
    if code := train(replace(opts, N_steps=4), accelerator, timed, dataset, [], 5, None):
        return code
    hldf = None if opts.no_hldf else timed.seconds[4]
    accelerator.print("\n".join(plan.describe_times(timed.seconds[1:4], hldf, max_steps, hldf_updates)))
    accelerator.end_training()
    return 0


def main() -> int:
    opts = parse(MedArtOptions, __doc__, presets=plan.PRESETS)
    asked = opts.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    dtype, remark = devices.pick_dtype(asked, devices.pick_device())
    stopping.end_with_launcher()
    waiting = InitProcessGroupKwargs(timeout=timedelta(hours=2))  # the others wait while the first one samples
    accelerator = Accelerator(mixed_precision="bf16" if dtype is torch.bfloat16 else "no", kwargs_handlers=[waiting])
    folder = Path(opts.output_dir) if opts.output_dir else ROOT / "medart"
    say, first = accelerator.print, accelerator.is_main_process

    # The folder and the data are checked before any model loads.
    name = full_size.NAME if opts.random_weights else opts.pretrained_model_name_or_path or pretrained.NANO
    settings = asdict(opts) | {
        "dataset_name": opts.dataset_name or training_data.DEFAULT_DATA,
        "mixed_precision": asked,
        "precision": str(dtype),
        "num_processes": accelerator.num_processes,
    }
    with stopping.first_process_first(accelerator.device):
        examples, unseen = training_data.load(**opts.part("data"), show_progress=first)
        resumed, wish = None, opts.resume_from_checkpoint
        if not opts.dry_run:
            resumed = checkpoint.resume_decision(folder, settings, wish, FREE_ON_RESUME, first)
    say("\n".join([f"model: {name}; data: {settings['dataset_name']}", *([remark] if remark else [])]))
    if opts.dry_run:
        say("\n".join(plan.describe(name, {"dtype": dtype, **opts.memory_options()})))

    model = trainable.build(dtype=dtype, device=accelerator.device, **opts.part("model"))
    captions = [example.caption for example in [*examples, *unseen]]
    say(report_long_captions(model.tokenizer, captions, opts.max_token_length))
    size = image_sides(opts.resolution or model.image_size)
    dataset = data.CaptionDataset(examples, data.ImageTransform(size, opts.center_crop, opts.random_flip), opts.seed)
    held_out = data.CaptionDataset(unseen, data.ImageTransform(size, center_crop=True), opts.seed)
    if opts.cache_latents:
        dataset = latents.cache(dataset, model.vae, accelerator.autocast(), first)
    prompts = opts.validation_prompt or list(dict.fromkeys(example.caption for example in examples))[:4]
    if opts.no_text_encoder_lora:
        encoding = opts.max_token_length, accelerator.autocast(), first
        model.text_encoder = text_cache.cache_embeddings(model, [*prompts, *captions], *encoding)
    if opts.compile:
        compilation.enable(model)
    per_step = opts.train_batch_size * accelerator.num_processes * opts.gradient_accumulation_steps
    max_steps = opts.max_train_steps or opts.num_train_epochs * math.ceil(len(dataset) / per_step)
    rates = opts.part("optimizer") | {"scale": per_step if opts.scale_lr else 1}
    run = Run.start(model, folder, max_steps, **rates)
    if resumed:
        run.resume(resumed, max_steps)
        say(f"resuming from {resumed}")
    hldf_updates = 0 if opts.no_hldf else sum(step % opts.N_steps == 0 for step in range(run.step, max_steps))
    say(
        f"{len(dataset)} images ({len(held_out)} held out), batch {per_step}: steps {run.step} to {max_steps}, "
        f"{hldf_updates} of them with HLDF (M = {opts.M_times}, {opts.hldf_gradient}); "
        f"{sum(p.numel() for p in run.parameters):,} trained parameters"
    )
    if opts.dry_run:
        return dry_run(opts, accelerator, run, dataset, max_steps, hldf_updates)
    with checkpoint.begin(folder, settings, first), ExitStack() as stack:
        log = stack.enter_context(closing(RunLog(folder, opts, prompts, run.step))) if first else None
        code = train(opts, accelerator, run, dataset, held_out, max_steps, log)
        if log and not code:
            run.save_adapters(folder)
            log.model_card(name, settings, run.step)
            facts = {"resolution": size, "max_token_length": opts.max_token_length}
            checkpoint.finish(folder, run.step, prompts=prompts, **facts)
            say(f"finished: LoRA, log.jsonl, samples/ in {folder}; try: python sample.py --lora {quote(str(folder))}")
        elif log:
            say(f"stopped at step {run.step}: checkpoint in {folder}; run the same command again to go on")
    accelerator.end_training()
    return code


if __name__ == "__main__":
    with exit_codes():
        sys.exit(main())
