"""The two forms of a ridge regression over tokens: the tokens themselves while they are few, sums over them later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

TILE = 512
"""Columns of a Gram matrix that are made at once: only its part above the diagonal is, and memory is used again."""

PIECE = 4096
"""Tokens that are multiplied at once."""

ROWS = 256
"""Rows of a matrix that are summed at once: few enough to stay in the processor's cache."""


class Dots(NamedTuple):
    """Inner products of a solution S with ``G S``, with ``C`` and with the inputs' part of ``G``."""

    gram: float
    cross: float
    inputs: float


@dataclass(frozen=True)
class Projector:
    """The residual map ``x -> x + x W^T + b``; `weight` is ``[D_out, D_in]``, as in `torch.nn.Linear`."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to ``[..., D]``."""
        return x + torch.nn.functional.linear(x, self.weight, self.bias)


Solution = tuple[Projector, Dots]


class Tokens:
    """Few tokens, kept as they are: a system of their number instead of the channels' (the dual form), in float64.

    With X and R the tokens and residuals (centred where there is a bias), ``W^T = X^T a``, ``(X X^T + r) a = R``, and
    what is left of R is ``r a``: errors need no W.
    """

    def __init__(self, bias: bool) -> None:
        self.bias = bias
        self.count = 0
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """Keep ``[n, D]`` twice; copies are made."""
        self._pairs.append((x.clone(), y.clone()))
        self.count += len(x)

    def take(self) -> tuple[Tensor, Tensor]:
        """Hand over all tokens, ``[n, D]`` twice, and forget them."""
        x, y = (torch.cat(parts) for parts in zip(*self._pairs, strict=True))
        self._pairs, self.count = [], 0
        return x, y

    def solve(self, shrink: float) -> Solution | None:
        """Solve with `shrink` on the diagonal; None where the matrix is not positive definite."""
        x, r = self._wide()
        mean_x, mean_r = (v.mean(dim=0, keepdim=True) if self.bias else v.new_zeros(1, 1) for v in (x, r))
        x, r = x - mean_x, r - mean_r
        gram = x @ x.mT
        gram.diagonal().add_(shrink)
        factor, info = torch.linalg.cholesky_ex(gram)
        if int(info):
            return None
        dual = torch.cholesky_solve(r, factor)
        dots = self._dots(r - shrink * dual + mean_r)
        weight = dual.mT @ x
        bias = (mean_r - mean_x @ weight.mT)[0].float() if self.bias else None
        return Projector(weight.float(), bias), dots

    def dots(self, found: Projector) -> Dots:
        """Inner products of any map."""
        x, _ = self._wide()
        made = x @ found.weight.to(x).mT
        return self._dots(made + found.bias.to(x) if self.bias and found.bias is not None else made)

    def _dots(self, made: Tensor) -> Dots:
        """Inner products of a map from what it makes of the tokens."""
        x, r = self._wide()
        return Dots(*(float((made * other).sum()) for other in (made, r, x)))

    def _wide(self) -> tuple[Tensor, Tensor]:
        x, y = (torch.cat(parts).double() for parts in zip(*self._pairs, strict=True))
        return x, y.sub_(x)


class Sums:
    """``G = sum [x, 1]^T [x, 1]`` (its part above the diagonal) and ``C^T = sum r^T [x, 1]``, in `precision`.

    Values that came in bfloat16 are multiplied as such, without loss. A residual is no bfloat16 number, so there
    `cross` sums ``y^T [x, 1]``, which is ``C^T`` and the first rows of G.
    """

    def __init__(self, width: int, bias: bool, precision: torch.dtype, like: Tensor) -> None:
        self.width, self.bias, self.precision = width, bias, precision
        self._of_targets = precision != torch.float64 and like.dtype == torch.bfloat16
        self._gram = torch.zeros(width + bias, width + bias, dtype=precision, device=like.device)
        self._cross = torch.zeros(width, width + bias, dtype=precision, device=like.device)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add tokens, ``[n, D]`` twice."""
        for some, others in zip(x.split(PIECE), y.split(PIECE), strict=True):
            self._add(some, others)

    def _add(self, x: Tensor, y: Tensor) -> None:
        # Targets, then inputs, each with the summed dimension last: the layout that multiplies quickly.
        width = self.width
        across = torch.empty(2 * width, len(x), dtype=self.precision, device=x.device)
        _flip(across[:width], y)
        _flip(across[width:], x)
        if not self._of_targets:
            across[:width].sub_(across[width:])
        stored = x.dtype if self._of_targets and y.dtype == x.dtype else self.precision
        with products_of(stored, x.device):
            for i in range(0, width, TILE):
                j = min(width, i + TILE)
                made = torch.nn.functional.linear(across[: width + j], across[width + i : width + j])
                self._cross[:, i:j].add_(made[:width])
                self._gram[:j, i:j].add_(made[width:])
        if self.bias:
            sums = across.sum(dim=1)
            self._cross[:, -1] += sums[:width]
            self._gram[:-1, -1] += sums[width:]
            self._gram[-1, -1] += len(x)

    def solve(self, shrink: float, refine_steps: int = 0) -> Solution | None:
        """Solve with `shrink` on the diagonal (a bias is not shrunk), then go down the gradient without it.

        None where the matrix is not positive definite.
        """
        # Sums in float32 are solved in float32: its rounding is below theirs, and float64 takes twice as long.
        for precision in dict.fromkeys((self.precision, torch.float64)):
            cross = self._residual_cross().to(precision)
            regular = self._gram.to(precision, copy=True)
            regular.diagonal()[: self.width].add_(shrink)
            # The part below the diagonal is all that is read, and the transpose costs nothing.
            factor, info = torch.linalg.cholesky_ex(regular.mT)
            del regular
            if int(info) == 0:
                break
        else:
            return None
        solution = torch.cholesky_solve(cross.mT, factor)
        del factor
        if refine_steps:
            gram = self._whole().to(precision)
            step = 1.0 / float(torch.linalg.eigvalsh(gram)[-1])
            for _ in range(refine_steps):
                solution = solution - step * (gram @ solution - cross.mT)
            return self._solution(solution.mT, self._dots(solution.mT))
        # G S = C - r S, since that is what S solves; so every inner product follows from S and C.
        inside = solution.mT[:, : self.width]
        with_cross, squares = _dot(solution.mT, cross), _dot(inside, inside)
        trace = float(cross.diagonal().double().sum()) - shrink * float(inside.diagonal().double().sum())
        return self._solution(solution.mT, Dots(with_cross - shrink * squares, with_cross, trace))

    def dots(self, found: Projector) -> Dots:
        """Inner products of any map."""
        bias = [found.bias[:, None]] if self.bias and found.bias is not None else []
        return self._dots(torch.cat([found.weight, *bias], dim=1).double())

    def _dots(self, found: Tensor) -> Dots:
        gram = self._whole().to(found)
        cross = _dot(found, self._residual_cross().to(found))
        return Dots(_dot(found, found @ gram), cross, _dot(found, gram[: self.width]))

    def _solution(self, found: Tensor, dots: Dots) -> Solution:
        weight = found.float()
        bias = weight[:, -1].contiguous() if self.bias else None
        return Projector(weight[:, : self.width].contiguous(), bias), dots

    def _residual_cross(self) -> Tensor:
        """``C^T``; may be the sum in use."""
        if not self._of_targets:
            return self._cross
        whole = self._whole()
        return whole[: self.width].neg_().add_(self._cross)

    def _whole(self) -> Tensor:
        """A copy of G with both halves."""
        gram = self._gram.clone()
        for i in range(0, len(gram), TILE):
            tile = gram[i : i + TILE, i : i + TILE]
            tile.copy_(tile.triu() + tile.triu(1).mT)
            gram[i + TILE :, i : i + TILE] = self._gram[i : i + TILE, i + TILE :].mT
        return gram


def _flip(out: Tensor, rows: Tensor) -> None:
    """Write the transpose of ``[n, D]``, a part of it at a time: the whole would miss the cache at each element."""
    for i in range(0, len(rows), ROWS):
        out[:, i : i + ROWS].copy_(rows[i : i + ROWS].mT)


def _dot(a: Tensor, b: Tensor) -> float:
    """Sum of products, over a row at a time and then in float64."""
    parts = zip(a.split(ROWS), b.split(ROWS), strict=True)
    return sum(float((some * other).sum(dim=1).double().sum()) for some, other in parts)


@contextmanager
def products_of(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices whose values were `dtype` on the units for that dtype; sums stay in float32.

    For values that `dtype` holds exactly nothing is lost: the product of two bfloat16 numbers fits a float32. Other
    float32 values are rounded to what the units take (bfloat16 on a CPU, TF32 on CUDA) before they are multiplied.
    """
    backend: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    wanted = "bf16" if device.type == "cpu" and dtype == torch.bfloat16 else ""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        backend, wanted = torch.backends.cuda.matmul, "tf32"
    if not wanted:
        yield
        return
    before = backend.fp32_precision
    backend.fp32_precision = wanted
    try:
        yield
    finally:
        backend.fp32_precision = before
