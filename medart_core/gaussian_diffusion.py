"""The diffusion process of DiT: a linear schedule of 1000 steps, and the variances that the network learns.

As in arXiv:2105.05233 and arXiv:2212.09748: the network predicts the noise, and for each value where the logarithm of
the reverse step's variance lies between its two bounds.
"""

import torch
from torch import Tensor, nn

NUM_TIMESTEPS, BETA_START, BETA_END = 1000, 1e-4, 0.02


def cumulative_alphas() -> Tensor:
    """The share of the signal's power that is left after each step: (1000,) float64, from 0.9999 to 4.04e-5."""
    return (1 - torch.linspace(BETA_START, BETA_END, NUM_TIMESTEPS, dtype=torch.float64)).cumprod(0)


def spaced_timesteps(num_steps: int) -> list[int]:
    """`num_steps` timesteps from 0 to 999, evenly spaced and rounded: 0, 4, 8, ..., 995, 999 for 250."""
    return [round(step * (NUM_TIMESTEPS - 1) / (num_steps - 1)) for step in range(num_steps)]


class GaussianDiffusion(nn.Module):
    """The schedule's tables, computed in float64 and kept in fp32 on the device, so that no step copies from the host.

    They are in no state dict. In what follows x_start and noise are (B, C, h, w), t is (B,) int64 in [0, 1000).
    """

    signal_rate: Tensor
    noise_rate: Tensor
    log_max_variance: Tensor
    log_min_variance: Tensor
    mean_per_error: Tensor

    def __init__(self) -> None:
        super().__init__()
        alpha_bar = cumulative_alphas()
        before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        beta = 1 - alpha_bar / before
        posterior_variance = beta * (1 - before) / (1 - alpha_bar)
        posterior_variance[0] = posterior_variance[1]  # 0 has no logarithm; arXiv:2102.09672 takes the next one
        tables = {
            "signal_rate": alpha_bar.sqrt(),
            "noise_rate": (1 - alpha_bar).sqrt(),
            "log_max_variance": beta.log(),
            "log_min_variance": posterior_variance.log(),
            # An error e in the noise moves the mean of the reverse step by -e times this.
            "mean_per_error": beta / ((1 - beta) * (1 - alpha_bar)).sqrt(),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)

    @staticmethod
    def at(table: Tensor, t: Tensor) -> Tensor:
        """Each image's entry of a table: (B, 1, 1, 1)."""
        return table[t][:, None, None, None]

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The latents after t + 1 noising steps."""
        return self.at(self.signal_rate, t) * x_start + self.at(self.noise_rate, t) * noise

    def log_variance(self, values: Tensor, t: Tensor) -> Tensor:
        """Logarithm of the reverse step's variance, from the network's `values`: -1 is the least, 1 the greatest."""
        share = (values + 1) / 2
        return share * self.at(self.log_max_variance, t) + (1 - share) * self.at(self.log_min_variance, t)
