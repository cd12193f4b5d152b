"""Linear CKA, the gap of Eq. 6, and means over samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ppcl_fx.schema.analysis import Matrix

TOKENS = 256
"""Tokens whose directions are compared at once: few enough to stay in the processor's cache."""


@dataclass(frozen=True)
class Representation:
    """Samples' tokens ready for CKA: centred features ``[B, T, D]``, or their Gram matrices ``[B, T, T]``, of norm 1.

    `features` have ``||X^T X||_F = 1`` (and so has ``X X^T``, which `gram` holds where that is the cheaper
    form); `defined` is false for samples whose tokens are all alike: their CKA is 0 / 0.
    """

    features: Tensor
    gram: Tensor | None
    defined: Tensor


def centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Centre ``[B, T, D]`` over its tokens, scale each sample to norm 1, and say which have unlike tokens, ``[B]``."""
    x = x.float()
    moved = x - x.mean(dim=1, keepdim=True)
    # Scaled by its norm: squares of squares of large activations would overflow.
    size = moved.flatten(1).norm(dim=1)
    # Rounding leaves the mean of equal tokens off by an ulp or so: what is left of them then is noise.
    defined = size > 1e-6 * x.flatten(1).norm(dim=1)
    return moved.div_(torch.where(defined, size, 1.0)[:, None, None]), defined


def represent(x: Tensor) -> Representation:
    """Centre ``[B, T, D]`` over its tokens and scale each sample so that its own HSIC is 1."""
    state, defined = centred(x)
    tokens, width = state.shape[1:]
    gram = state @ state.mT if tokens <= width else None
    own = (state.mT @ state if gram is None else gram).flatten(1).norm(dim=1)
    own = torch.where(defined, own, 1.0)[:, None, None]
    return Representation(state / own.sqrt(), None if gram is None else gram / own, defined)


def cka(a: Representation, b: Representation) -> Tensor:
    """Linear CKA of each sample, ``[B]``, NaN where undefined.

    ``||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F)``, or the same number from the Gram matrices, ``<X X^T, Y
    Y^T>`` over their norms, where there are fewer tokens than channels.
    """
    if a.gram is not None and b.gram is not None:
        value = (a.gram * b.gram).sum(dim=(1, 2))
    else:
        value = (a.features.mT @ b.features).square().sum(dim=(1, 2))
    return torch.where(a.defined & b.defined, value, float("nan"))


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA between ``[B, T, D]`` and ``[B, T, E]`` for each sample: ``[B]``, in [0, 1], NaN where undefined."""
    return cka(represent(x), represent(y))


def directional_gap(x: Tensor, y: Tensor) -> Tensor:
    """Mean over tokens of ``||Norm(x) - Norm(y)||^2``, Norm along channels (Eq. 6): ``[B, T, D]`` twice to ``[B]``."""
    normalize = torch.nn.functional.normalize
    parts = [
        (normalize(some.float(), dim=-1) - normalize(others.float(), dim=-1)).square().sum(dim=-1)
        for some, others in zip(x.split(TOKENS, dim=1), y.split(TOKENS, dim=1), strict=True)
    ]
    return torch.cat(parts, dim=1).mean(dim=-1)


class Average:
    """Running means of the entries of a matrix, over the samples that define them.

    `tensors` are the sums and counts in use, by name: what is written to them counts.
    """

    def __init__(self, size: int) -> None:
        self._sum = torch.zeros(size, size, dtype=torch.float64)
        self._count = torch.zeros(size, size, dtype=torch.int64)
        self.tensors = {"sum": self._sum, "count": self._count}

    def add(self, row: int, column: int, values: Tensor) -> None:
        """Add one value for each sample; NaN counts for nothing."""
        known = values[~values.isnan()].double()
        self._sum[row, column] += known.sum().cpu()
        self._count[row, column] += len(known)

    def matrix(self) -> Matrix:
        """The means; None where nothing was added."""
        means = (self._sum / self._count.clamp(min=1)).tolist()
        return [
            [value if count else None for value, count in zip(row, counts, strict=True)]
            for row, counts in zip(means, self._count.tolist(), strict=True)
        ]
