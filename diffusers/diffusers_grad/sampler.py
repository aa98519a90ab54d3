"""Noise -> latents -> pixels with gradients: PixArt sampled by DPM-Solver++ (arXiv 2211.01095).

The solver is the official scheduler, whose `step` is differentiable as it is; only the pipeline's `__call__` is not:
https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/schedulers/scheduling_dpmsolver_multistep.py
https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/pipelines/pixart_alpha/pipeline_pixart_alpha.py
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusers_grad.cross_attention import prompt_arguments

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler

GRADIENT_MODES = ("full", "last_k", "sparse", "one_step", "none")
VAE_DOWNSAMPLING = 8


def sample_latents(
    transformer: nn.Module,
    scheduler: DPMSolverMultistepScheduler,
    latents: Tensor,
    prompt_embeds: Tensor,
    prompt_attention_mask: Tensor,
    negative_prompt_embeds: Tensor | None,
    negative_prompt_attention_mask: Tensor | None,
    *,
    num_inference_steps: int = 20,
    guidance_scale: float = 4.5,
    gradient: str = "none",
    k: int = 5,
    checkpoint_steps: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Solve the probability-flow ODE from noise to clean latents, keeping the graph that `gradient` names.

    `transformer` is a PixArtTransformer2DModel, bare or wrapped by PEFT (not by DDP); `scheduler` stays untouched.
    `latents` (B, 4, h, w) is unit Gaussian noise; the embeddings are (B, L, D), the masks (B, L). The result is fp32
    (B, 4, h, w), scaled as all of PixArt's latents are. With `guidance_scale <= 1` the negative prompt may be None.

    Modes, for M = `num_inference_steps`; the noise itself has a gradient in `full` only:
    - `full`: exact, through all M steps, both guidance branches and the multistep history.
    - `last_k`: the last `k` steps; the latent before them and the x0 prediction in the solver's history are constants
      (DRaFT-K, arXiv 2309.17400).
    - `sparse`: steps 0, k, 2k, ..., the network's input a constant in each (DRTune, arXiv 2405.00760), so that no
      product of network Jacobians arises; gradients are multiplied by sum |dx/d eps_i| over all steps divided by the
      sum over these.
    - `one_step`: a uniformly random step, drawn from `generator`, ends the rollout: its x0 prediction is returned, the
      network's input a constant (ReFL, arXiv 2304.05977).
    - `none`: no graph; `backward` raises.

    `checkpoint_steps` recomputes each graph step's network in the backward pass; it nests with the transformer's own
    `enable_gradient_checkpointing()`. Without autocast the network runs in its own dtype; all else is fp32.
    Raises ValueError for an unknown mode, a `k` outside 1..M, a missing negative prompt, another scheduler.
    """
    _check(scheduler, gradient, k, num_inference_steps)
    guided = guidance_scale > 1
    if guided:
        if negative_prompt_embeds is None or negative_prompt_attention_mask is None:
            raise ValueError("guidance_scale > 1 needs negative_prompt_embeds and negative_prompt_attention_mask")
        prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
        prompt_attention_mask = torch.cat([negative_prompt_attention_mask, prompt_attention_mask])
    dtype = _network_dtype(transformer, latents)
    graph_steps = _graph_steps(gradient, num_inference_steps, k, generator)
    predict = partial(
        _predict_noise,
        transformer=transformer,
        prompt=prompt_arguments(transformer, prompt_embeds.to(dtype)),
        prompt_attention_mask=prompt_attention_mask,
        guidance_scale=guidance_scale if guided else None,
        added_cond_kwargs=size_conditions(transformer, latents, len(prompt_embeds), dtype),
        dtype=dtype,
    )
    if checkpoint_steps:
        # Only the network may be recomputed: a second `scheduler.step` would advance the solver twice.
        predict = partial(checkpoint, predict, use_reentrant=False, preserve_rng_state=_draws_dropout(transformer))
    latents = latents.float() if gradient == "full" else latents.detach().float()
    return _rollout(predict, scheduler, latents, num_inference_steps, gradient, graph_steps)


def decode_latents(vae: AutoencoderKL, latents: Tensor, *, checkpointing: bool = False) -> Tensor:
    """Decode scaled latents (B, 4, h, w) to fp32 pixels (B, 3, 8h, 8w), about [-1, 1], not clamped.

    One image at a time, since the decoder's activations are the peak of a colour step; `checkpointing` keeps only the
    latents of each image for backward, and nests with the VAE's own `enable_gradient_checkpointing()`.
    """
    dtype = _network_dtype(vae, latents)

    def decode(image_latents: Tensor) -> Tensor:
        return vae.decode(image_latents.to(dtype), return_dict=False)[0].float()  # pyright: ignore[reportArgumentType]

    if checkpointing:
        decode = partial(checkpoint, decode, use_reentrant=False, preserve_rng_state=_draws_dropout(vae))
    unscaled = latents.float() / vae.config["scaling_factor"]
    return torch.cat([cast(Tensor, decode(image_latents)) for image_latents in unscaled.split(1)])


def _check(scheduler: DPMSolverMultistepScheduler, gradient: str, k: int, num_inference_steps: int) -> None:
    if gradient not in GRADIENT_MODES:
        raise ValueError(f"gradient is {gradient!r}: choose one of {', '.join(GRADIENT_MODES)}")
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps is {num_inference_steps}: it must be 1 or more")
    if gradient in ("last_k", "sparse") and not 1 <= k <= num_inference_steps:
        raise ValueError(
            f"k is {k}: gradient {gradient!r} needs 1 <= k <= num_inference_steps = {num_inference_steps}"
        )
    algorithm = scheduler.config.get("algorithm_type")
    if algorithm != "dpmsolver++" or scheduler.config.get("thresholding"):
        raise ValueError(
            f"{type(scheduler).__name__} has algorithm_type {algorithm!r} and thresholding"
            f" {scheduler.config.get('thresholding')!r}: use DPMSolverMultistepScheduler with 'dpmsolver++' and False"
        )


def _graph_steps(gradient: str, steps: int, k: int, generator: torch.Generator | None) -> range:
    """The indices of the steps whose network call has a graph, in the order of sampling (step 0 sees pure noise)."""
    if gradient == "full":
        return range(steps)
    if gradient == "last_k":
        return range(steps - k, steps)
    if gradient == "sparse":
        return range(0, steps, k)
    if gradient == "one_step":
        device = "cpu" if generator is None else generator.device
        drawn = int(torch.randint(steps, (), generator=generator, device=device))
        return range(drawn, drawn + 1)
    return range(0)


def _rollout(
    predict: Callable[..., Any],
    scheduler: DPMSolverMultistepScheduler,
    latents: Tensor,
    steps: int,
    gradient: str,
    graph_steps: range,
) -> Tensor:
    solver = _fresh_solver(scheduler, steps, latents.device)
    gain = 1.0
    if gradient == "sparse":
        weights = _solver_weights(scheduler, steps)
        gain = float(weights.sum() / weights[graph_steps.start :: graph_steps.step].sum())
    latents = latents * solver.init_noise_sigma
    for i, t in enumerate(solver.timesteps):
        network_input = solver.scale_model_input(latents, t)
        if gradient in ("sparse", "one_step"):
            network_input = network_input.detach()
        with contextlib.nullcontext() if i in graph_steps else torch.no_grad():
            eps = predict(network_input, t)
        if i not in graph_steps:
            # Before https://github.com/pytorch/pytorch/pull/165068 autocast reused a weight cast without a graph in
            # the next step, whose gradient was then silently lost.
            torch.clear_autocast_cache()
        if gradient == "sparse":
            constant = eps.detach()
            eps = constant + gain * (eps - constant)  # the same value, `gain` times the gradient
        latents = solver.step(eps, t, latents, return_dict=False)[0]
        if gradient == "one_step" and i in graph_steps:
            # x0 = (x_t - sigma_t eps) / alpha_t, which the solver has just stored as its data prediction.
            return cast(Tensor, solver.model_outputs[-1])
    return latents


def _predict_noise(
    latents: Tensor,
    t: Tensor,
    *,
    transformer: nn.Module,
    prompt: Mapping[str, Any],
    prompt_attention_mask: Tensor,
    guidance_scale: float | None,
    added_cond_kwargs: Mapping[str, Tensor | None],
    dtype: torch.dtype,
) -> Tensor:
    """The fp32 noise prediction, guided unless `guidance_scale` is None; the prompt is [negative, positive]."""
    network_input = latents if guidance_scale is None else torch.cat([latents, latents])  # (B or 2B, 4, h, w)
    eps = transformer(
        network_input.to(dtype),
        **prompt,
        encoder_attention_mask=prompt_attention_mask,
        timestep=t.expand(len(network_input)),
        added_cond_kwargs=added_cond_kwargs,
        return_dict=False,
    )[0].float()
    if eps.shape[1] == 2 * latents.shape[1]:
        eps = eps.chunk(2, dim=1)[0]  # the second half is the learned variance, of no use to an ODE solver
    if guidance_scale is None:
        return eps
    unconditional, conditional = eps.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


def _fresh_solver(
    scheduler: DPMSolverMultistepScheduler, steps: int, device: torch.device | str
) -> DPMSolverMultistepScheduler:
    """A private solver for one rollout: the caller's would keep the graph alive in its `model_outputs`."""
    solver = cast("DPMSolverMultistepScheduler", type(scheduler).from_config(scheduler.config))
    solver.set_timesteps(steps, device=device)
    solver.set_begin_index(0)
    return solver


def _solver_weights(scheduler: DPMSolverMultistepScheduler, steps: int) -> Tensor:
    """|dx_M / d eps_i| of the solver alone, the other predictions fixed: (M,).

    A step of DPM-Solver++ (2211.01095, algorithm 2) is linear in the latent and in the x0 = (x - sigma eps) / alpha of
    this and the previous step, so the response to a unit eps_i, from x = 0 and with all others 0, is the derivative.
    """
    solver = _fresh_solver(scheduler, steps, "cpu")
    unit_eps = torch.eye(steps).reshape(steps, steps, 1, 1, 1)
    response = torch.zeros(steps, 1, 1, 1)
    for eps, t in zip(unit_eps, solver.timesteps, strict=True):
        response = solver.step(cast(Any, eps), t, response, return_dict=False)[0]
    return response.flatten().abs()


def _network_dtype(network: nn.Module, latents: Tensor) -> torch.dtype:
    """The dtype of the network's input: under autocast fp32, for autocast to lower; else that of its parameters."""
    if torch.is_autocast_enabled(latents.device.type):
        return torch.float32
    # The first floating-point parameter belongs to the base, not to an adapter, which PEFT may hold in another dtype.
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)


def _draws_dropout(network: nn.Module) -> bool:
    """Whether a recomputation may have to replay the random state: no module in eval mode draws from it."""
    return any(module.training for module in network.modules())


def size_conditions(
    transformer: nn.Module, latents: Tensor, rows: int, dtype: torch.dtype
) -> dict[str, Tensor | None]:
    """The image size as a condition, which only the 1024 px checkpoint (sample_size 128) was trained with."""
    config: Any = cast(Any, transformer).config
    if config["sample_size"] != 128:
        return {"resolution": None, "aspect_ratio": None}
    height, width = (VAE_DOWNSAMPLING * side for side in latents.shape[-2:])
    resolution = torch.tensor([[height, width]], dtype=dtype, device=latents.device).repeat(rows, 1)
    aspect_ratio = torch.tensor([[height / width]], dtype=dtype, device=latents.device).repeat(rows, 1)
    return {"resolution": resolution, "aspect_ratio": aspect_ratio}
