"""Time of cases that take turns, and the operations and peak memory of one call."""

import gc
import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Meter(TorchDispatchMode):
    """Counts the operations that are run below it (views excepted) and the bytes of the tensors they make.

    `peak_bytes` is the most that was alive at once; compiled code is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.live_bytes, self.peak_bytes = 0, 0, 0
        self.known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None):
        result = func(*args, **(kwargs or {}))
        self.operations += not func.is_view and "unsafe_view" not in func.name()
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def forget(_: weakref.ref) -> None:
            del self.known[key]
            self.live_bytes -= size

        self.known[key] = weakref.ref(storage, forget)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


def count(step: Callable[[], object]) -> dict[str, float]:
    """Operations of one call and the peak memory of its tensors in MB, the model and its optimiser not counted."""
    gc.collect()
    meter = Meter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with meter:
        step()
    peak = torch.cuda.max_memory_allocated() - before if torch.cuda.is_available() else meter.peak_bytes
    return {"operations": meter.operations, "peak_mb": round(peak / 1e6, 1)}


def interleave(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each step, which take turns since machines drift: median and minimum, and minimal CPU time."""
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            gc.collect()
            started, cpu_started = time.perf_counter(), time.process_time()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - cpu_started)
    return {
        name: {
            "seconds_median": round(statistics.median(wall[name]), 4),
            "seconds_min": round(min(wall[name]), 4),
            "cpu_seconds_min": round(min(cpu[name]), 4),
        }
        for name in steps
    }
