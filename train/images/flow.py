"""Rectified flow: noise levels as training draws them, and what the transformer gets at one."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ppcl_fx.errors import PpclError, near

DENSITIES = ("logit-normal", "uniform")  # how a noise level is drawn before the shift
Shift = Literal["static", "exponential", "linear"]
"""How a scheduler shifts noise levels: by its `shift`, or by a `mu` that depends on the number of tokens."""


@dataclass(frozen=True)
class Density:
    """The density of noise levels u in (0, 1), before the scheduler's shift.

    It is "logit-normal" (u = sigmoid(n), n normal with `mean` and `std`; Esser et al. 2024, arXiv 2403.03206, Sec.
    3.1) or "uniform". Raises PpclError where it is another, or the standard deviation is not above 0.
    """

    name: str = "logit-normal"
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in DENSITIES:
            raise PpclError(f"noise levels {self.name!r}{near(self.name, DENSITIES)}; use {' or '.join(DENSITIES)}")
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise PpclError(f"noise levels of mean {self.mean} and deviation {self.std}; use finite ones above 0")

    def draw(self, generator: torch.Generator) -> float:
        """Return one noise level u, inside of (0, 1)."""
        if self.name == "uniform":
            u = float(torch.rand((), generator=generator, dtype=torch.float64))
        else:
            n = torch.randn((), generator=generator, dtype=torch.float64)
            u = float(torch.sigmoid(self.mean + self.std * n))
        return min(max(u, 1e-6), 1 - 1e-6)  # at 0 the shift divides by zero


def shifted(u: float, kind: Shift, amount: float) -> float:
    """Return sigma, the noise level u, in (0, 1), after a scheduler's shift.

    `amount` is the scheduler's `shift` s, sigma = s u / (1 + (s - 1) u), or the pipeline's `mu` m, sigma = a / (a + 1
    / u - 1) with a = exp(m) ("exponential") or a = m ("linear").
    """
    if kind == "static":
        return amount * u / (1 + (amount - 1) * u)
    factor = math.exp(amount) if kind == "exponential" else amount
    return factor / (factor + (1 / u - 1))


def noised(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Return x_t = (1 - sigma) x_0 + sigma eps, computed in float32, in the dtype of `clean`."""
    return ((1 - sigma) * clean.float() + sigma * noise.float()).to(clean.dtype)


def generator_of(*what: int) -> torch.Generator:
    """Return a random generator that depends on these numbers (seed, epoch, sample) and nothing else."""
    digest = hashlib.sha256(" ".join(map(str, what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
