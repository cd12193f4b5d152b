"""Noise levels: their distribution by numbers, and the scheduler's own shift."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ppcl_fx.errors import PpclError
from ppcl_fx.train.images.flow import Density, Shift, generator_of, noised, shifted

MANY = 4000
LEVELS = [0.001, 0.05, 0.3, 0.5, 0.77, 0.999]


def drawn(density: Density) -> torch.Tensor:
    return torch.tensor(
        [density.draw(generator_of(0, 0, index)) for index in range(MANY)], dtype=torch.float64
    )


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7)])
def test_logit_normal_levels_have_the_mean_and_deviation(mean: float, std: float) -> None:
    normal = torch.logit(drawn(Density("logit-normal", mean, std)))
    # Four standard errors of 4000 draws.
    assert abs(float(normal.mean()) - mean) < 4 * std / math.sqrt(MANY)
    assert abs(float(normal.std()) - std) < 4 * std / math.sqrt(2 * MANY)
    # What the mean and deviation cannot tell: the share within one deviation.
    assert abs(float(((normal - mean).abs() < std).double().mean()) - 0.6827) < 0.03


def test_uniform_levels_are_uniform() -> None:
    levels = drawn(Density("uniform")).sort().values
    # The largest distance of the two distributions (Kolmogorov), at a level of one in a thousand.
    steps = torch.arange(1, MANY + 1, dtype=torch.float64) / MANY
    assert float((levels - steps).abs().max()) < 1.95 / math.sqrt(MANY)


@pytest.mark.parametrize(
    ("kind", "amount", "config"),
    [
        ("static", 3.0, {"shift": 3.0}),
        ("static", 1.0, {}),
        ("exponential", 1.15, {"use_dynamic_shifting": True}),
        ("exponential", 0.5, {"use_dynamic_shifting": True, "shift": 3.0}),
        ("linear", 2.0, {"use_dynamic_shifting": True, "time_shift_type": "linear"}),
    ],
)
def test_the_shift_is_the_scheduler_s(kind: Shift, amount: float, config: dict[str, object]) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(sigmas=LEVELS, mu=None if kind == "static" else amount)
    ours = [shifted(u, kind, amount) for u in LEVELS]
    torch.testing.assert_close(torch.tensor(ours), scheduler.sigmas[:-1], rtol=1e-6, atol=1e-7)


def test_noised_is_on_the_straight_line() -> None:
    clean, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.equal(noised(clean, noise, 0.25), 0.75 * clean + 0.25 * noise)
    assert torch.equal(noised(clean, noise, 1.0), noise)
    rounded = noised(clean.bfloat16(), noise, 0.25)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, (0.75 * clean.bfloat16().float() + 0.25 * noise).bfloat16())


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(PpclError, match=r"'logitnormal' \(did you mean 'logit-normal'\?\)"):
        Density("logitnormal")
    with pytest.raises(PpclError, match="above 0"):
        Density(std=0.0)
