"""Random streams that are named, not carried along: the same names give the same numbers anywhere, at any time."""

import numpy as np
import torch
from torch import Tensor


def generator(*names: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by the whole sequence of non-negative integers, such as (seed, stream, step)."""
    # With their number in front, (1, 2) and (1, 2, 0) differ; numpy alone would fill up with zeros.
    state = np.random.SeedSequence((len(names), *names)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0] >> 1))


class SharedDraws:
    """The random numbers of one step, drawn for the batch of all processes; each process gets its own rows.

    So N processes with B images each see the numbers that one process with N * B images sees, and a resumed run sees
    those of the uninterrupted one. On another device than the CPU they are drawn there, and are others.
    """

    def __init__(
        self,
        names: tuple[int, ...],
        rows: int,
        rank: int = 0,
        num_processes: int = 1,
        device: torch.device | str = "cpu",
    ):
        self.generator, self.device = generator(*names, device=device), device
        self.total = rows * num_processes
        self.mine = slice(rows * rank, rows * (rank + 1))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, (rows, *shape) float32."""
        return torch.randn(self.total, *shape, generator=self.generator, device=self.device)[self.mine]

    def integers(self, high: int) -> Tensor:
        """Uniform in [0, high), (rows,) int64."""
        return torch.randint(high, (self.total,), generator=self.generator, device=self.device)[self.mine]

    def uniform(self) -> Tensor:
        """Uniform in [0, 1), (rows,) float32."""
        return torch.rand(self.total, generator=self.generator, device=self.device)[self.mine]
