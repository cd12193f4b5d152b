"""Linear CKA, of two states and of many pairs of states of the same samples; the gap of Eq. 6; means over samples.

Linear CKA of centred X and Y is ``<X X^T, Y Y^T>`` over the norms of both, or ``||X^T Y||^2`` over those of ``X^T X``
and ``Y^T Y``. The first needs one Gram matrix ``[T, T]`` a state, the second one product ``[D, D]`` a pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


# ---- many pairs: what belongs to one state is made once, not for each pair -----------------------------------------

TILE = 512
"""Rows of Gram matrices of tokens that are made at once, up to the diagonal."""

STACK_BYTES = 64 * 2**20
"""Memory for the same rows of the Gram matrices of all states."""

SUMMED = 2**16
"""Entries of Gram matrices that are summed at once, in float64."""


def comparer(outputs: Sequence[Tensor]) -> Comparer:
    """Return what compares states ``[B, T, D]``: by kernels unless there are many more tokens than channels."""
    tokens, width = outputs[0].shape[1:]
    return Kernels(outputs) if tokens <= 2 * width else Features(outputs)


class Features:
    """Compares the teacher's states with each other, and some of them with surrogates, by products of features."""

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        self._states = [represent(output) for output in outputs]
        self._first = 0

    def heat(self) -> Tensor:
        """CKA between all states, ``[B, states, states]``, NaN where undefined."""
        size = len(self._states)
        found = torch.empty(len(self._states[0].defined), size, size, dtype=torch.float64)
        for u, one in enumerate(self._states):
            for k in range(u, size):
                found[:, u, k] = found[:, k, u] = cka(one, self._states[k])
        return found

    def choose(self, first: int, last: int) -> None:
        """Prepare states ``first`` to ``last`` (excluded) for `against`."""
        self._first = first

    def against(self, start: int, x: Tensor) -> Tensor:
        """CKA of ``[n, B, T, D]`` with the chosen states from number `start` on: ``[n, B]``, NaN where undefined."""
        states = self._states[self._first + start :]
        return torch.stack([cka(state, represent(made)) for state, made in zip(states, x, strict=False)])


class Kernels:
    """Does what `Features` does by Gram matrices of tokens, a few rows at a time and no further than the diagonal."""

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        pairs = [centred(output) for output in outputs]
        self._states = [state for state, _ in pairs]
        self._defined = torch.stack([defined for _, defined in pairs])  # [states, B]
        self._norms = torch.ones(self._defined.shape, dtype=torch.float64, device=self._defined.device)
        self._chosen: list[Tensor] = []
        self._first = 0

    def heat(self) -> Tensor:
        batch, tokens = self._states[0].shape[:2]
        size = len(self._states)
        found = torch.zeros(batch, size, size, dtype=torch.float64, device=self._states[0].device)
        step = max(1, min(TILE, STACK_BYTES // (4 * size * batch * tokens)))
        for i, j in _steps(tokens, step):
            rows = torch.stack([_rows(state, i, j) for state in self._states], dim=1)  # [B, states, rows, j]
            found += 2 * _products(rows[..., :i].flatten(2)) + _products(rows[..., i:].flatten(2))
        norms = found.diagonal(dim1=1, dim2=2).sqrt()
        self._norms = norms.T.where(self._defined, 1.0)
        known = self._defined.T
        known = known[:, :, None] & known[:, None, :]
        return torch.where(known, found / (norms[:, :, None] * norms[:, None, :]), float("nan"))

    def choose(self, first: int, last: int) -> None:
        self._first, states = first, self._states[first:last]
        steps = _steps(self._states[0].shape[1], TILE)
        self._chosen = [torch.stack([_rows(state, i, j) for state in states]) for i, j in steps]

    def against(self, start: int, x: Tensor) -> Tensor:
        count, batch, tokens = x.shape[:3]
        state, defined = centred(x.flatten(0, 1))
        cross, own = (torch.zeros(count, batch, dtype=torch.float64, device=x.device) for _ in range(2))
        for (i, j), chosen in zip(_steps(tokens, TILE), self._chosen, strict=True):
            rows = _rows(state, i, j).unflatten(0, (count, batch))
            cross += _inner(rows, chosen[start : start + count], i)
            own += _inner(rows, rows, i)
        place = slice(self._first + start, self._first + start + count)
        known = self._defined[place] & defined.unflatten(0, (count, batch))
        norms = self._norms[place] * own.sqrt()
        return torch.where(known, cross / norms, float("nan"))


Comparer = Features | Kernels


def _steps(tokens: int, step: int) -> Iterator[tuple[int, int]]:
    return ((i, min(tokens, i + step)) for i in range(0, tokens, step))


def _rows(state: Tensor, i: int, j: int) -> Tensor:
    """Rows i to j of Gram matrices, up to column j."""
    return state[:, i:j] @ state[:, :j].mT


def _inner(a: Tensor, b: Tensor, i: int) -> Tensor:
    """Inner products of rows of Gram matrices; what is left of the diagonal tile stands for its mirror image too."""
    product = a * b
    return 2 * product[..., :i].sum(dim=(-1, -2)).double() + product[..., i:].sum(dim=(-1, -2)).double()


def _products(vectors: Tensor) -> Tensor:
    """Inner products of ``[B, n, length]``: ``[B, n, n]``, in float64."""
    total = vectors.new_zeros(vectors.shape[0], vectors.shape[1], vectors.shape[1], dtype=torch.float64)
    for some in vectors.split(SUMMED, dim=-1):
        wide = some.double()
        total += wide @ wide.mT
    return total
