"""Kinds of call: which arguments a transformer is given, and what an argument that is not given stands for.

diffusers passes a text mask where a batch is padded and none where it is not. A missing mask is a mask of ones where
the model gives the same with it, to the bit: then one trace serves both kinds.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ppcl_fx.errors import PpclError

Size = int | tuple[str, int]
"""A number, or an argument's name and one of its dimensions."""
Sizes = Sequence[Size]
"""The shape of an argument in terms of the others of its call."""
Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of a call's tensors by the arguments' names."""
REFUSALS = (PpclError, RuntimeError, ValueError, IndexError, TypeError, AssertionError)
"""How models say that an argument does not fit."""


def is_fixed(value: Any) -> bool:
    """Tell whether an argument is part of a trace; all others are inputs of the graph."""
    return value is None or isinstance(value, (bool, str)) or (isinstance(value, Mapping) and not value)


def kind_of(kwargs: Mapping[str, Any]) -> Hashable:
    """Return what calls of one kind share: arguments, values of fixed ones, which tensors have one row for all."""
    given = {name: value for name, value in kwargs.items() if value is not None and name != "return_dict"}
    single = one_row(given)
    return frozenset(
        (name, repr(value) if is_fixed(value) else "one row" if name in single else "") for name, value in given.items()
    )


def one_row(kwargs: Mapping[str, Any]) -> set[str]:
    """Return the tensors that have one row where others have one a sample, as the text of one prompt for all has."""
    shapes = shapes_of(kwargs)
    rows = _rows(shapes)
    return {name for name, shape in shapes.items() if rows > 1 and len(shape) > 1 and shape[0] == 1}


def repeated(kwargs: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call where what has a row for each sample in `like`, another one, has one for each sample too."""
    shapes, rows = shapes_of(like), _rows(shapes_of(kwargs))
    many = {name for name, shape in shapes.items() if shape and shape[0] == _rows(shapes) > 1}
    wanted = one_row(kwargs) & many
    return {name: v.expand(rows, *v.shape[1:]) if name in wanted else v for name, v in kwargs.items()}


def _rows(shapes: Shapes) -> int:
    """Return the samples of a call; the first tensor is the noisy sample."""
    return next((shape[0] for shape in shapes.values() if shape), 1)


class Examples(dict[str, Any]):
    """The arguments of a call to trace with, and what is known of the other calls of a recording.

    That is a call of each other kind, the shapes of the tensors of all calls, each once, and `ones`: the arguments that
    stand for ones where they are missing, with the shape of the ones.
    """

    def __init__(
        self,
        kwargs: Mapping[str, Any],
        others: Sequence[Mapping[str, Any]] = (),
        shapes: Sequence[Shapes] = (),
        ones: Mapping[str, Sizes] | None = None,
    ) -> None:
        super().__init__(kwargs)
        self.others, self.shapes, self.ones = others, shapes, dict(ones or {})

    def over(self, kwargs: Mapping[str, Any]) -> Examples:
        """Return the same with other values for the arguments of the call to trace with."""
        return Examples(kwargs, self.others, self.shapes, self.ones)


def shapes_of(kwargs: Mapping[str, Any]) -> Shapes:
    """Return the shapes of those arguments that are tensors, or that stand for stored ones."""
    return {name: tuple(value.shape) for name, value in kwargs.items() if hasattr(value, "shape")}


def filled(kwargs: Mapping[str, Any], ones: Mapping[str, tuple[Sizes, torch.dtype]]) -> dict[str, Any]:
    """Return a call's arguments with ones, by their shape and dtype, in the place of those missing in `ones`."""
    given = dict(kwargs)
    missing = {name: of for name, of in ones.items() if given.get(name) is None}
    single = one_row(kwargs) if missing else set()
    for name, (sizes, dtype) in missing.items():
        # One row for all samples says nothing of their number.
        told = not any(size == (other, 0) for other in single for size in sizes)
        shape = ones_shape(sizes, kwargs) if told else None
        if shape is not None:
            device = next(kwargs[size[0]].device for size in sizes if not isinstance(size, int))
            given[name] = torch.ones(shape, dtype=dtype, device=device)
    return given


def ones_shape(sizes: Sizes, kwargs: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the shape of ones for a call; None where it does not follow from the call's tensors."""
    shapes = shapes_of({size[0]: kwargs.get(size[0]) for size in sizes if not isinstance(size, int)})
    found = []
    for size in sizes:
        if isinstance(size, int):
            found.append(size)
        elif size[0] in shapes and 0 <= size[1] < len(shapes[size[0]]):
            found.append(shapes[size[0]][size[1]])
    return tuple(found) if shapes and len(found) == len(sizes) else None


def ones_in(examples: Examples, model: nn.Module) -> dict[str, Sizes]:
    """Find the arguments that stand for ones where they are missing, with the shape of the ones.

    The model is run on each kind that lacks an argument which others have and which holds nothing but zeros and ones
    there, once as it is and once with ones in its place: it must give the same, to the bit.
    """
    if getattr(model, "is_cache_enabled", False):
        return {}  # it answers by what it was asked before
    kinds = [repeated(kwargs, examples) for kwargs in (examples, *examples.others)]
    found = _candidates(kinds, examples.shapes)
    device = next((tensor.device for tensor in model.parameters() if not tensor.is_meta), torch.device("cpu"))
    for kwargs in kinds:
        missing = {name: ones for name, ones in found.items() if kwargs.get(name) is None}
        if not missing or _same(model, kwargs, missing, device):
            continue
        for name, ones in missing.items():
            if len(missing) == 1 or not _same(model, kwargs, {name: ones}, device):
                del found[name]
    return {name: sizes for name, (sizes, _) in found.items()}


def _candidates(kinds: Sequence[Mapping[str, Any]], shapes: Sequence[Shapes]) -> dict[str, tuple[Sizes, torch.dtype]]:
    """Return the masks that some calls have and others have not, with shape and dtype."""
    found = {}
    for name in dict.fromkeys(name for kwargs in kinds for name in kwargs):
        given = [kwargs[name] for kwargs in kinds if kwargs.get(name) is not None]
        if 0 < len(given) < len(kinds) and all(map(_is_mask, given)):
            others = set.intersection(*(set(shapes_of(kwargs)) for kwargs in kinds)) - {name}
            sizes = _sizes(name, [known for known in (*shapes, *map(shapes_of, kinds)) if name in known], others)
            if sizes is not None:
                found[name] = (sizes, given[0].dtype)
    return found


def _is_mask(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_meta and bool(((value == 0) | (value == 1)).all())


def _sizes(name: str, shapes: Sequence[Shapes], others: Iterable[str]) -> Sizes | None:
    """Return the shape of an argument in terms of others that every call has; None where it does not follow."""
    rank = len(shapes[0][name])
    if any(len(known[name]) != rank for known in shapes):
        return None
    # Where several say the same, the one whose name is most like the argument's: a text mask goes with the text.
    names = sorted(others, key=lambda other: (-SequenceMatcher(None, name, other).ratio(), other))
    sizes: list[Size] = []
    for dim in range(rank):
        wanted = [known[name][dim : dim + 1] for known in shapes]
        places = [(other, at) for other in names for at in range(len(shapes[0].get(other, ())))]
        found = [(other, at) for other, at in places if [known[other][at : at + 1] for known in shapes] == wanted]
        # The batch is dimension 0 of what is batched, and so on: dimensions keep their places where they can.
        if found:
            sizes.append(next((one for one in found if one[1] == dim), found[0]))
        elif set(wanted) == {(1,)}:
            sizes.append(1)
        else:
            return None
    return sizes if any(not isinstance(size, int) for size in sizes) else None


def _same(
    model: nn.Module, kwargs: Mapping[str, Any], ones: Mapping[str, tuple[Sizes, torch.dtype]], device: torch.device
) -> bool:
    """Tell whether a model gives the same for a call with ones and without, to the bit."""

    def answer(call: Mapping[str, Any]) -> list[Any]:
        there = tree_map_only(torch.Tensor, lambda leaf: leaf.to(device), dict(call))
        result = model.forward(**there)  # not by a call: hooks of the caller's own need not know of it
        return tree_leaves(list(result.values()) if isinstance(result, Mapping) else result)

    completed = filled(kwargs, ones)
    if any(name not in completed for name in ones):
        return False
    try:
        with torch.no_grad():
            plain, other = answer(kwargs), answer(completed)
    except REFUSALS:
        return False
    return len(plain) == len(other) and all(map(_equal, plain, other))


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)
