"""How much of a device's arithmetic a training uses (MFU), against its data sheet and against a measured product."""

import copy
import time
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# Dense 16-bit TFLOP/s of the data sheets, by a part of the name that CUDA reports; the first that fits counts.
DATA_SHEETS = {
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "H800": 989, "A100": 312, "A800": 312, "L40S": 362,
    "L40": 181, "L4": 121, "A10G": 70, "A10": 125, "A6000": 155, "V100": 125, "T4": 65, "RTX 4090": 165,
    "RTX 3090": 71,
}  # fmt: skip
TIMED_SECONDS = 0.3


def forward_flops(model: Any) -> int:
    """Floating-point operations of a DiT's forward pass for one image, counted without computing."""
    empty = copy.deepcopy(model).to("meta").eval()
    side = empty.input_size
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        empty(torch.empty(1, empty.in_channels, side, side), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops()


def data_sheet_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """What the device's data sheet promises for 16-bit products; None where that is unknown."""
    if device.type != "cuda" or dtype is torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in DATA_SHEETS.items() if part in name), None)


def measured_tflops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """TFLOP/s of a product of random square matrices, the best of several within a moment, and what it is called."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best, end = 0.0, time.perf_counter() + TIMED_SECONDS
    while time.perf_counter() < end:
        started = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - started) / 1e12)
    return best, f"{side} x {side} product in {str(dtype).removeprefix('torch.')}"


class Throughput:
    """Images per second as shares of a device's arithmetic: of the data sheet's and of a measured product's."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype):
        self.flops_per_image = 3 * forward_flops(model)  # the backward pass takes two forward passes
        self.spec = data_sheet_tflops(device, dtype)
        self.measured, self.measured_name = measured_tflops(device, dtype)

    def shares(self, images_per_sec: float) -> dict[str, float | None]:
        """`mfu_of_data_sheet`, null where that is unknown, and `mfu_of_measured`; of one device's images."""
        tflops = images_per_sec * self.flops_per_image / 1e12
        return {
            "mfu_of_data_sheet": None if self.spec is None else tflops / self.spec,
            "mfu_of_measured": tflops / self.measured,
        }

    def describe(self) -> str:
        """One line about what MFU refers to."""
        sheet = "" if self.spec is None else f", and of the data sheet's {self.spec} TFLOP/s in 16 bits"
        return (
            f"{self.flops_per_image / 1e9:.1f} GFLOP per image and step; MFU, the share of the device's arithmetic in "
            f"use, is relative to {self.measured:.2f} TFLOP/s, measured ({self.measured_name}){sheet}"
        )
