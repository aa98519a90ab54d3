"""Where the models compute, and in which precision; without the seconds that importing diffusers takes."""

import torch

from medart_core.errors import UserError


def pick_device() -> torch.device:
    """CUDA, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def bf16_is_native(device: torch.device) -> bool:
    """Whether bf16 arithmetic is done by the hardware rather than emulated at a fraction of the speed of fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return any(getattr(torch.cpu, check, lambda: False)() for check in checks)
    return False


def pick_dtype(mixed_precision: str, device: torch.device, fp16: bool = False) -> tuple[torch.dtype, str | None]:
    """The dtype for `no` or `bf16`, with `fp16` also for that, and one line for the user where it is not as asked."""
    if mixed_precision == "no":
        return torch.float32, None
    if mixed_precision not in ("bf16", *["fp16"] * fp16):
        reason = "" if fp16 else ", T5 overflows in it"
        raise UserError(f"mixed precision {mixed_precision!r} is not supported{reason}; use bf16 or no")
    if mixed_precision == "fp16" and device.type == "cuda":
        return torch.float16, None
    dtype = torch.bfloat16 if bf16_is_native(device) else torch.float32
    if mixed_precision == "bf16" and dtype is torch.bfloat16:
        return dtype, None
    used = "bf16" if dtype is torch.bfloat16 else "fp32"
    return dtype, f"{mixed_precision} is not native on this {device.type} device: computing in {used}"


def named_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of `fp32`, `bf16` or `fp16`; `auto` is bf16 on a GPU that has it natively, else fp32."""
    if name == "auto":
        return pick_dtype("bf16", device)[0] if device.type == "cuda" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
