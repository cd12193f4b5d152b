"""Which dimensions of a model's inputs can change, found by trying; and calls of other shapes to check with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map

from ppcl_fx.errors import PpclError
from ppcl_fx.export.onnx.graph_run import run_graph
from ppcl_fx.passes.lowering.positions import POSITIONS, tables

Dim = tuple[str, int]
"""An input's name and one of its dimensions."""

_STEPS = (16, 8, 4, 2, 1)
"""By how much a size is changed: the first that the model takes. Patches want multiples, so the large ones first."""

_NUMBER_STEPS = (2, 1, 4, 8, 16)
"""The same for numbers that positions are given by: those count patches already."""

REFUSALS = (PpclError, RuntimeError, ValueError, IndexError, TypeError, AssertionError)
"""How models say that a shape does not fit."""


@dataclass(frozen=True)
class Axis:
    """A size that can change.

    Attributes:
        name: ``batch``, or the first input and dimension it was found at, ``hidden_states_1``.
        dims: the tensor dimensions of the call that change together.
        size: the size in the example.
        other: another size that the model takes.
        numbers: for positions given as Python numbers, which number becomes which.
    """

    name: str
    dims: tuple[Dim, ...]
    size: int
    other: int
    numbers: tuple[tuple[int, int], ...] = ()

    def turned(self) -> Axis:
        """Return the axis of a call that has the other size."""
        return replace(self, size=self.other, other=self.size, numbers=tuple((new, old) for old, new in self.numbers))


def widened(kwargs: dict[str, Any], batch: int) -> dict[str, Any]:
    """Return a call of `batch` samples, or with two where it has one, which would be taken for a constant."""
    return dict(kwargs) if batch > 1 else resized(kwargs, _batch(kwargs, batch, 2))


def resized(kwargs: dict[str, Any], axis: Axis) -> dict[str, Any]:
    """Return a call in which one axis has its other size; values are repeated, and floats moved a little.

    Lists with one item per sample get longer with the batch.
    """
    result, numbers = dict(kwargs), dict(axis.numbers)
    for name, dim in axis.dims:
        result[name] = _stretched(result[name], dim, axis.other)
    for name, value in kwargs.items():
        if isinstance(value, list) and axis.name == "batch" and len(value) == axis.size:
            result[name] = [value[i % axis.size] for i in range(axis.other)]
        elif numbers and not isinstance(value, torch.Tensor):
            result[name] = tree_map(lambda leaf: numbers.get(leaf, leaf) if type(leaf) is int else leaf, value)
    return result


def _stretched(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    if tensor.is_meta:
        return tensor.new_empty((*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]))
    out = tensor.index_select(dim, torch.arange(size) % tensor.shape[dim])
    if not out.is_floating_point():
        return out
    generator = torch.Generator().manual_seed(size)
    noise = torch.rand(out.shape, generator=generator, dtype=torch.float32).to(out.dtype)
    return out * (0.9 + 0.2 * noise)


def find_axes(
    gm: GraphModule, lowered: GraphModule, kwargs: dict[str, Any], batch: int, found: Sequence[Axis] | None = None
) -> list[Axis]:
    """Find the sizes of a call that the model lets change, by changing them and running it.

    Args:
        gm: the graph before lowering, guards included: what it takes is what the model takes.
        lowered: the same after lowering, for its position tables.
        kwargs: a call, with at least two samples.
        batch: its samples.
        found: sizes that may change in another mixture of the same model, tried first: together, once.

    Returns:
        The batch, sizes that follow from positions given as Python numbers, and all others in the order of the inputs.

    Raises:
        PpclError: the model does not take another batch size.
    """
    if found is not None and _runs(gm, variants(kwargs, found)["all"]):
        return list(found)
    axes = [_batch_axis(gm, kwargs, batch)]
    axes += _numbered_axes(gm, lowered, kwargs, axes)
    for dim in _dims(kwargs):
        if not any(dim in axis.dims for axis in axes):
            free = _try_dim(gm, kwargs, dim, axes)
            axes += [free] if free is not None else []
    return axes


def _dims(kwargs: dict[str, Any]) -> dict[Dim, int]:
    """Return the size of every dimension of a call's tensors."""
    tensors = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
    return {(name, dim): size for name, tensor in tensors.items() for dim, size in enumerate(tensor.shape)}


def _runs(gm: GraphModule, kwargs: dict[str, Any]) -> bool:
    try:
        run_graph(gm, kwargs)
    except REFUSALS:
        return False
    return True


def _batch(kwargs: dict[str, Any], batch: int, other: int) -> Axis:
    dims = tuple((name, dim) for (name, dim), size in _dims(kwargs).items() if dim == 0 and size == batch)
    return Axis("batch", dims, batch, other)


def _batch_axis(gm: GraphModule, kwargs: dict[str, Any], batch: int) -> Axis:
    axis = _batch(kwargs, batch, batch + 1)
    if not _runs(gm, resized(kwargs, axis)):
        raise PpclError(
            f"the model does not take {batch + 1} samples in the shape of the recorded call with {batch}; "
            "record calls with another batch size"
        )
    return axis


def _numbered_axes(gm: GraphModule, lowered: GraphModule, kwargs: dict[str, Any], axes: list[Axis]) -> list[Axis]:
    """Change the numbers that positions are given by, read the new sizes off the tables, and follow them."""
    if lowered.meta.get(POSITIONS) is None:
        return []
    before = tables(lowered, kwargs)
    for numbers in _other_numbers(kwargs):
        changed = resized(kwargs, Axis("", (), 0, 0, numbers))
        try:
            after = tables(lowered, changed)
        except REFUSALS:
            continue
        pairs = {
            (old, new)
            for name in before
            for old, new in zip(before[name].shape, after[name].shape, strict=True)
            if old != new
        }
        if len(pairs) != 1:
            continue
        old, new = pairs.pop()
        for dims in _groups(kwargs, old, axes):
            axis = Axis(f"{dims[0][0]}_{dims[0][1]}", dims, old, new, numbers)
            if _runs(gm, resized(kwargs, axis)):
                return [axis]
    return []


def _other_numbers(kwargs: dict[str, Any]) -> Iterator[tuple[tuple[int, int], ...]]:
    numbers = {leaf for leaf in tree_leaves(kwargs) if type(leaf) is int and leaf > 1}
    for step in _NUMBER_STEPS:
        for number in sorted(numbers, reverse=True):
            yield ((number, number + step),)


def _groups(kwargs: dict[str, Any], size: int, axes: list[Axis], *first: Dim) -> Iterator[tuple[Dim, ...]]:
    """Yield sets of free dimensions of one size, those in `first` in each of them; small sets first."""
    taken = {*first, *(dim for axis in axes for dim in axis.dims)}
    rest = [dim for dim, own in _dims(kwargs).items() if own == size and dim not in taken]
    smallest = 0 if first else 1
    for count in dict.fromkeys([*range(smallest, min(3, len(rest)) + 1), len(rest)]):
        for chosen in combinations(rest, count):
            yield (*first, *chosen)


def _try_dim(gm: GraphModule, kwargs: dict[str, Any], dim: Dim, axes: list[Axis]) -> Axis | None:
    size = int(kwargs[dim[0]].shape[dim[1]])
    for dims in _groups(kwargs, size, axes, dim):
        for step in _STEPS:
            axis = Axis(f"{dim[0]}_{dim[1]}", dims, size, size + step)
            if _runs(gm, resized(kwargs, axis)):
                return axis
    return None


def variants(kwargs: dict[str, Any], axes: Sequence[Axis]) -> dict[str, dict[str, Any]]:
    """Return the calls to check with, by name: as traced, each axis changed alone, and all of them changed."""
    calls = {"traced": dict(kwargs)}
    everything = dict(kwargs)
    for axis in axes:
        calls[f"{axis.name}={axis.other}"] = resized(kwargs, axis)
        everything = resized(everything, axis)
    calls["all"] = everything
    return calls
