"""The average of the weights: what it is after some steps, that nothing else changes it, and how it starts."""

import copy
from typing import Any

import torch
from torch import nn

from medart_core.ema import EMA


def network() -> Any:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[1].bias.requires_grad_(False)
    return model


def test_the_average_is_the_weighted_sum_of_all_weights_so_far():
    model = network()
    ema, first = EMA(model, decay=0.75, warmup=False), copy.deepcopy(model[0].weight)
    weights = [torch.full_like(first, float(value)) for value in (1, 2, 3)]
    for step, weight in enumerate(weights):
        model[0].weight.data.copy_(weight)
        ema.update(step)
    expected = 0.75**3 * first + 0.25 * (0.75**2 * weights[0] + 0.75 * weights[1] + weights[2])
    torch.testing.assert_close(ema.model[0].weight, expected)
    assert torch.equal(ema.model[1].bias, model[1].bias) and not ema.model[0].weight.requires_grad


def test_it_is_what_a_loop_over_the_parameters_gives():
    model, loop = network(), network()
    ema = EMA(model)
    for step in range(4):
        for p in model.parameters():
            p.data.add_(torch.randn_like(p) * p.requires_grad)
        ema.update(step)
        for average, p in zip(loop.parameters(), model.parameters(), strict=True):
            average.data.mul_(ema.decay_at(step)).add_(p.data, alpha=1 - ema.decay_at(step))
    for average, expected in zip(ema.model.parameters(), loop.parameters(), strict=True):
        torch.testing.assert_close(average.data, expected.data)


def test_the_first_steps_count_less_unless_told_otherwise():
    ema = EMA(network())
    assert [ema.decay_at(step) for step in (0, 90, 10**6)] == [0.1, 0.91, 0.9999]
    assert EMA(network(), warmup=False).decay_at(0) == 0.9999
    assert EMA(network(), decay=0.5).decay_at(90) == 0.5


def test_it_is_kept_in_fp32_and_apart_from_the_weights():
    model = network().to(torch.bfloat16)
    average = EMA(model).model
    assert all(p.dtype == torch.float32 for p in average.parameters()) and not average.training
    model[0].weight.data.zero_()
    assert average[0].weight.abs().sum() > 0
