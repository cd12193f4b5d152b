"""Linear probes by streamed normal equations (Eq. 1 and 2)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ppcl_fx.errors import PpclError
from ppcl_fx.passes.calibration.normal_sums import ROWS, Dots, Projector, Solution, Sums, Tokens

__all__ = ["WIDE", "Fit", "NormalEquations", "Projector"]

WIDE = 2048
"""Above this many channels sums are made and kept in float32: sixty blocks of width 3072 in float64 take 20 GB."""


class Fit(NamedTuple):
    """How well a residual map fits: relative squared error, and the cosine of the outputs."""

    error: float
    cosine: float


class NormalEquations:
    """What determines the least-squares map from `x` to the residual ``y - x``, whatever the number of samples.

    Tokens are samples. While they are fewer than half the channels they are kept as they are; after that as the sums
    ``G = sum x x^T`` and ``C = sum x r^T`` (``r = y - x``), and memory is ``O(D^2)`` in both cases. With `bias`, a
    constant 1 is appended to x.

    Attributes:
        samples: how many tokens were added.
        width: their channels; 0 before the first.
    """

    def __init__(self, bias: bool = False) -> None:
        self.bias = bias
        self.clear()

    def clear(self) -> None:
        """Forget all samples."""
        self.samples = self.width = 0
        self._tokens = Tokens(self.bias)
        self._sums: Sums | None = None
        self._known: Solution | None = None
        # Sums over all tokens of x^2, y^2, (y - x)^2 and x (y - x).
        self._inputs = self._target = self._residual = self._inner = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the tokens of `x` and `y`, both ``[..., D]``. Raises `PpclError`: a value is NaN or infinite."""
        if x.ndim == y.ndim and len(x) == 1:
            x = x.expand(len(y), *x.shape[1:])  # one text for all samples, which goes into the first block as one
        if x.shape != y.shape:
            raise RuntimeError(f"a residual map needs equal shapes, got {tuple(x.shape)} and {tuple(y.shape)}")
        rows, targets = (value.detach().reshape(-1, value.shape[-1]) for value in (x, y))
        self._known, self.width = None, rows.shape[1]
        energies = self._energies(rows, targets)
        # One NaN anywhere makes a sum NaN, so the sums check every value.
        if not energies.isfinite().all():
            raise PpclError("activations hold NaN or infinity; check the model's weights and the recorded calls")
        inputs, outputs, residual, inner = energies.tolist()
        self._inputs += inputs
        self._target += outputs
        self._residual += residual
        self._inner += inner
        self.samples += len(rows)
        if len(rows) > self.width // 2:
            self._summed(rows, targets)
            return
        self._tokens.add(rows, targets)
        if self._tokens.count > self.width // 2:
            self._flush()

    def solve(self, ridge: float = 1e-6, refine_steps: int = 0) -> Projector:
        """The minimiser of Eq. 2 with a ridge (Eq. 1), then `refine_steps` gradient steps on Eq. 2 without it.

        `ridge` is relative to the mean of the Gram matrix's diagonal; a bias is not shrunk. Eq. 2 over the samples is a
        quadratic that G and C determine, so its exact gradient costs one product, and steps of 1/lambda_max never raise
        it. A `ridge` below the rounding of the sums is raised to it.

        Raises:
            PpclError: the regularised Gram matrix is singular (all activations are zero).
        """
        if not self.samples:
            raise RuntimeError("no samples were added")
        # A Gram matrix of low rank is indefinite by its rounding error, at most eps times its trace.
        least = (self.width + self.bias) * torch.finfo(self._precision).eps
        shrink = max(ridge, least) * self._inputs / self.width
        dual = self._sums is None and not refine_steps
        self._known = self._tokens.solve(shrink) if dual else self._flush().solve(shrink, refine_steps)
        if self._known is None:
            raise PpclError(
                f"the Gram matrix of a probe is singular at ridge {ridge:g}: its inputs are all zero; check the model"
            )
        return self._known[0]

    def fit(self, projector: Projector) -> Fit:
        """Both measures of a projector; raises as `cosine`."""
        return Fit(self.error(projector), self.cosine(projector))

    def error(self, projector: Projector) -> float:
        """Squared error of `projector` relative to ``sum (y - x)^2``: 1 for a projector of zeros.

        A map that changes nothing has the error 0.
        """
        dots = self._dots(projector)
        if self._residual == 0.0:
            return 0.0
        return max(0.0, self._residual + dots.gram - 2 * dots.cross) / self._residual

    def cosine(self, projector: Projector) -> float:
        """Cosine between the projector's outputs and y, all tokens taken as one vector. Raises `PpclError`: all outputs
        are zero.
        """
        # <x + Wx + b, y> and |x + Wx + b|^2, with y = x + r, from the sums alone.
        dots = self._dots(projector)
        dot = self._inputs + self._inner + dots.inputs + dots.cross
        made = self._inputs + 2 * dots.inputs + dots.gram
        if made <= 0.0 or self._target <= 0.0:
            raise PpclError("block outputs are all zero, so their similarity is undefined; check the model's weights")
        return min(1.0, dot / math.sqrt(made * self._target))

    @property
    def energy(self) -> float:
        """Mean squared length of a token of y."""
        return self._target / max(1, self.samples)

    @property
    def _precision(self) -> torch.dtype:
        return torch.float64 if self.width <= WIDE else torch.float32

    def _dots(self, projector: Projector) -> Dots:
        """What the measures of a projector are made of; for the one solved last it is known already."""
        if self._known is None or self._known[0] is not projector:
            kept = self._tokens if self._sums is None else self._flush()
            self._known = (projector, kept.dots(projector))
        return self._known[1]

    def _flush(self) -> Sums:
        """Return the sums, with the tokens that were kept."""
        if self._tokens.count:
            self._summed(*self._tokens.take())
        assert self._sums is not None
        return self._sums

    def _summed(self, rows: Tensor, targets: Tensor) -> None:
        if self._sums is None:
            self._sums = Sums(self.width, self.bias, self._precision, rows)
        self._sums.add(rows, targets)

    def _energies(self, rows: Tensor, targets: Tensor) -> Tensor:
        """Sums over all tokens of ``x^2``, ``y^2``, ``(y - x)^2`` and ``x (y - x)``, in float64."""
        total = torch.zeros(4, dtype=torch.float64, device=rows.device)
        for some, others in zip(rows.split(ROWS), targets.split(ROWS), strict=True):
            x, y = some.to(self._precision), others.to(self._precision)
            r = y - x
            parts = [(a * b).sum(dim=1).double().sum() for a, b in ((x, x), (y, y), (r, r), (x, r))]
            total += torch.stack(parts)
        return total
