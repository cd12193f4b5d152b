"""Linear probes by streamed normal equations (Eq. 1 and 2), and the pass that writes their fit onto the
graph."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from ppcl_fx.errors import PpclError
from ppcl_fx.passes.contract import Pass, Result
from ppcl_fx.passes.precision import products_of

if TYPE_CHECKING:
    from ppcl_fx.passes.measure import Measurement

WIDE = 2048
"""Above this many channels sums are made and kept in float32: sixty blocks of width 3072 in float64 take 20
GB."""


@dataclass(frozen=True)
class Projector:
    """The residual map ``x -> x + x W^T + b``: `weight` is ``[D_out, D_in]`` as in `torch.nn.Linear`, `bias`
    may be None."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to ``[..., D]``."""
        return x + torch.nn.functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Fit:
    """How well a residual map fits: relative squared error, and the cosine of the outputs."""

    error: float
    cosine: float


@dataclass(frozen=True)
class _Solved:
    """A projector S and its inner products with ``G S``, ``C`` and ``sum [x, 1] x^T``."""

    projector: Projector
    gram: float
    cross: float
    inputs: float


class NormalEquations:
    """Sums that determine the least-squares map from `x` to the residual ``y - x``, whatever the number of
    samples.

    Tokens are samples. Kept are ``G = sum x x^T``, ``C = sum x r^T`` (``r = y - x``), ``sum r^2`` and, for
    the cosine of the outputs, ``sum y^2``; memory is ``O(D^2)``. With `bias`, a constant 1 is appended to x.
    """

    def __init__(self, bias: bool = False) -> None:
        self.bias = bias
        self.samples = 0
        self._gram: Tensor | None = None
        self._cross: Tensor | None = None
        self._residual = 0.0
        self._target = 0.0
        self._solved: _Solved | None = None

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the tokens of `x` and `y`, both ``[..., D]``.

        Raises:
            PpclError: a value is NaN or infinite.
        """
        if x.shape != y.shape:
            raise RuntimeError(
                f"a residual map needs equal shapes, got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        precision = torch.float64 if x.shape[-1] <= WIDE else torch.float32
        rows = x.detach().reshape(-1, x.shape[-1]).to(precision)
        targets = y.detach().reshape(-1, y.shape[-1]).to(precision)
        residual = targets - rows
        if self.bias:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        if self._gram is None or self._cross is None:
            self._gram = rows.new_zeros(rows.shape[1], rows.shape[1])
            self._cross = rows.new_zeros(rows.shape[1], targets.shape[1])
        self._solved = None
        energy = float(residual.square().sum(dtype=torch.float64))
        target = float(targets.square().sum(dtype=torch.float64))
        # One NaN anywhere makes a sum NaN, so the two sums check every value.
        if not (abs(energy) < float("inf") and abs(target) < float("inf")):
            raise PpclError(
                "activations hold NaN or infinity; check the model's weights and the recorded calls"
            )
        self._add_products(rows, targets, residual, x.dtype)
        self._residual += energy
        self._target += target
        self.samples += len(rows)

    def clear(self) -> None:
        """Forget all samples."""
        self.samples = 0
        self._gram = self._cross = None
        self._residual = self._target = 0.0
        self._solved = None

    def solve(self, ridge: float = 1e-6, refine_steps: int = 0) -> Projector:
        """The minimiser of Eq. 2 with a ridge (Eq. 1), then `refine_steps` gradient steps on Eq. 2 without
        it.

        `ridge` is relative to the mean of the Gram matrix's diagonal; a bias is not shrunk. Eq. 2 over the
        samples is a quadratic that G and C determine, so its exact gradient costs one product, and steps of
        1/lambda_max never raise it. A `ridge` below the rounding of the sums is raised to it.

        Raises:
            PpclError: the regularised Gram matrix is singular (all activations are zero).
        """
        if self._gram is None or self._cross is None:
            raise RuntimeError("no samples were added")
        # Sums in float32 are solved in float32: its rounding is below theirs, and float64 takes twice as long.
        for gram, cross in ((self._gram, self._cross), self._sums()):
            # A Gram matrix of low rank is indefinite by its rounding error, at most eps times its trace.
            least = len(gram) * torch.finfo(self._gram.dtype).eps
            shrink = torch.full_like(gram[0], max(ridge, least) * self._scale(gram))
            if self.bias:
                shrink[-1] = 0.0
            factor, info = torch.linalg.cholesky_ex(gram + torch.diag(shrink))
            if int(info) == 0:
                solution = torch.cholesky_solve(cross, factor)
                break
        else:
            raise PpclError(
                f"the Gram matrix of a probe is singular at ridge {ridge:g}: its inputs are all zero; check the model"
            )
        if refine_steps:
            step = 1.0 / float(torch.linalg.eigvalsh(gram)[-1])
            for _ in range(refine_steps):
                solution = solution - step * (gram @ solution - cross)
            product = gram @ solution
        else:
            product = cross - shrink[:, None] * solution  # what the solution solves
        weight = solution.T.float()
        projector = Projector(weight.contiguous())
        if self.bias:
            projector = Projector(weight[:, :-1].contiguous(), weight[:, -1].contiguous())
        self._solved = _Solved(projector, *self._dots(solution, product))
        return projector

    def fit(self, projector: Projector) -> Fit:
        """Both measures of a projector.

        Raises:
            PpclError: all outputs are zero.
        """
        return Fit(self.error(projector), self.cosine(projector))

    def error(self, projector: Projector) -> float:
        """Squared error of `projector` relative to ``sum (y - x)^2``: 1 for a projector of zeros.

        A map that changes nothing has the error 0.
        """
        if self._residual == 0.0:
            return 0.0
        return max(0.0, self._squared_error(projector)) / self._residual

    @property
    def energy(self) -> float:
        """Mean squared length of a token of y."""
        return self._target / max(1, self.samples)

    def cosine(self, projector: Projector) -> float:
        """Cosine between the projector's outputs and y, all tokens taken as one vector.

        Raises:
            PpclError: all outputs are zero.
        """
        found = self._known(projector)
        assert self._gram is not None and self._cross is not None
        squares = float(self._gram.diagonal()[: self._cross.shape[1]].sum(dtype=torch.float64))
        residual_dot_x = float(self._cross.diagonal().sum(dtype=torch.float64))
        # <x + Wx + b, y> and |x + Wx + b|^2, with y = x + r, from the sums alone.
        dot = squares + residual_dot_x + found.inputs + found.cross
        made = squares + 2 * found.inputs + found.gram
        if made <= 0.0 or self._target <= 0.0:
            raise PpclError(
                "block outputs are all zero, so their similarity is undefined; check the model's weights"
            )
        return min(1.0, dot / math.sqrt(made * self._target))

    def _squared_error(self, projector: Projector) -> float:
        found = self._known(projector)
        return self._residual + found.gram - 2 * found.cross

    def _known(self, projector: Projector) -> _Solved:
        """What the measures of a projector are made of; for the one solved last it is known already."""
        if self._solved is None or self._solved.projector is not projector:
            gram, _ = self._sums()
            solution = self._solution(projector)
            self._solved = _Solved(projector, *self._dots(solution, gram @ solution))
        return self._solved

    def _dots(self, solution: Tensor, product: Tensor) -> tuple[float, float, float]:
        """Inner products of a solution S with G S, with C, and with the inputs' part of G."""
        assert self._gram is not None and self._cross is not None
        inputs = self._gram[:, : self._cross.shape[1]]  # sum [x, 1] x^T
        others = (product, self._cross, inputs)
        gram, cross, with_inputs = (float((solution * other).sum(dim=1).double().sum()) for other in others)
        return gram, cross, with_inputs

    def _add_products(self, rows: Tensor, targets: Tensor, residual: Tensor, stored: torch.dtype) -> None:
        """Add ``X^T X`` and ``X^T R``; values that came in bfloat16 are multiplied as such, without loss."""
        assert self._gram is not None and self._cross is not None
        if rows.dtype == torch.float64 or stored != torch.bfloat16:
            self._gram.addmm_(rows.T, rows)
            self._cross.addmm_(rows.T, residual)
            return
        with products_of(stored, rows.device):
            # This layout is the quick one: both operands with the summed dimension last.
            across = rows.T.contiguous()
            gram = torch.nn.functional.linear(across, across)
            self._gram += gram
            # A residual is no bfloat16 number, but X^T R is X^T Y less X^T X.
            both = torch.nn.functional.linear(across, targets.T.contiguous())
            self._cross += both.sub_(gram[:, : targets.shape[1]])

    def _solution(self, projector: Projector) -> Tensor:
        gram, _ = self._sums()
        rows = projector.weight.T
        if self.bias:
            if projector.bias is None:
                raise RuntimeError("sums with a bias need a projector with a bias")
            rows = torch.cat([rows, projector.bias[None]], dim=0)
        return rows.to(gram)

    def _sums(self) -> tuple[Tensor, Tensor]:
        if self._gram is None or self._cross is None:
            raise RuntimeError("no samples were added")
        return self._gram.double(), self._cross.double()

    def _scale(self, gram: Tensor) -> float:
        """Mean squared channel, summed over samples; the appended constant does not count."""
        diagonal = gram.diagonal()
        return float((diagonal[:-1] if self.bias else diagonal).mean())


@dataclass(frozen=True)
class LinearProbes(Pass):
    """Solve the probe of every block and stream, and write its relative fit to the block's output nodes.

    Annotates ``node.meta["ppcl"]`` with ``fit`` (Eq. 2 relative to the block's own change) and ``energy`` (the mean
    squared length of a token of the block's output).
    """

    measured: Measurement
    ridge: float = 1e-6
    refine_steps: int = 0

    name: ClassVar[str] = "linear-probes"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"

    def requires(self, gm: GraphModule) -> None:
        """Raises `PpclError` if the measurements are of another graph."""
        self.measured.require(gm)

    def apply(self, gm: GraphModule) -> Result:
        for site in self.measured.streams:
            fits = self.measured.fits(site, self.ridge, self.refine_steps)
            for node, fit, energy in zip(site.outputs, fits, self.measured.energies(site), strict=True):
                node.meta.setdefault("ppcl", {}).update(fit=fit, energy=energy)
        return Result(gm, modified=False)
