"""CKA of many pairs of states of the same samples: what belongs to one state is made once, not for each pair.

Linear CKA of centred X and Y is ``<X X^T, Y Y^T>`` over the norms of both, or ``||X^T Y||^2`` over those of ``X^T X``
and ``Y^T Y``. The first needs one Gram matrix ``[T, T]`` a state, the second one product ``[D, D]`` a pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ppcl_fx.passes.analysis.similarity import centred, cka, represent

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
