"""Residuals that a ControlNet adds, for whichever model's forward takes them."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ppcl_fx.schema.plan import DepthEdit
from tests.coverage.case import Kwargs
from tests.coverage.edits import replaced

COUNT = 8
"""Residuals in each list: at least one for every block, so that no two blocks share one."""


class NotTaken(Exception):
    """A model takes no residuals of its blocks' shapes, one for each block."""


def arguments(model: nn.Module) -> dict[str, bool]:
    """Return the arguments that take a collection of residuals, and whether it is a mapping by block number."""
    parameters = inspect.signature(model.forward).parameters.values()
    return {p.name: "dict" in str(p.annotation) for p in parameters if "controlnet" in p.name and not _flag(p)}


def _flag(parameter: inspect.Parameter) -> bool:
    return isinstance(parameter.default, bool)


def with_residuals(model: nn.Module, first_blocks: Sequence[str], kwargs: Kwargs) -> Kwargs:
    """Add random residuals to a call, of the shape of a block's output that the model takes them in.

    Raises:
        NotTaken: no such shape is taken.
    """
    plain = tree_flatten(model(**kwargs))[0]
    every = list(arguments(model).items())
    # One model takes a second list in a shape that no block has; then the first list alone.
    tries = itertools.product((every, every[:1]), _shapes(model, first_blocks, kwargs))
    for taken, shape in tries:
        generator = torch.Generator().manual_seed(9)
        given = dict(kwargs)
        for name, numbered in taken:
            values = [0.3 * torch.randn(shape, generator=generator) for _ in range(COUNT)]
            given[name] = dict(enumerate(values)) if numbered else values
        with contextlib.suppress(RuntimeError, ValueError):
            answer = tree_flatten(model(**given))[0]
            if any(not torch.equal(one, two) for one, two in zip(plain, answer, strict=True)):
                return given
    raise NotTaken


def _shapes(model: nn.Module, blocks: Sequence[str], kwargs: Kwargs) -> Iterator[torch.Size]:
    """The shapes of the longest outputs of the blocks."""
    seen: dict[torch.Size, None] = {}

    def look(_: nn.Module, __: Any, output: Any) -> None:
        states = [value for value in tree_flatten(output)[0] if isinstance(value, Tensor)]
        seen[max(states, key=lambda state: state.shape[1]).shape] = None

    handles = [model.get_submodule(block).register_forward_hook(look) for block in blocks]
    model(**kwargs)
    for handle in handles:
        handle.remove()
    yield from seen


def felt(answer: Callable[[Kwargs], Any], kwargs: Kwargs, names: Iterable[str]) -> list[bool]:
    """Tell for each residual of a call whether the answer of a model depends on it.

    Args:
        answer: gives the model's answer to a call.
        kwargs: the call.
        names: the arguments that hold residuals.
    """
    with torch.enable_grad():
        given: Kwargs = {**kwargs}
        residuals: list[Tensor] = []
        for name in (name for name in names if name in kwargs):
            known = kwargs[name]
            fresh = [value.clone().requires_grad_() for value in (known.values() if isinstance(known, dict) else known)]
            given[name] = dict(zip(known, fresh, strict=True)) if isinstance(known, dict) else fresh
            residuals += fresh
        total = sum(part.square().sum() for part in tree_flatten(answer(given))[0])
        slopes = torch.autograd.grad(total, residuals, allow_unused=True)
    return [slope is not None and bool(slope.any()) for slope in slopes]


@contextlib.contextmanager
def passing(model: nn.Module, edits: Sequence[DepthEdit], kwargs: Kwargs) -> Iterator[None]:
    """Let the blocks after the first of each interval give back what enters them: the model adds residuals between.

    Args:
        model: the model.
        edits: the intervals.
        kwargs: a call without residuals, from which it is learned which argument takes which output.
    """
    with contextlib.ExitStack() as stack:
        for edit in edits:
            first, *others = (model.get_submodule(f"{edit.stack}.{i}") for i in range(edit.first, edit.last + 1))
            links = _links(model, first, others[0], kwargs)
            for block in others:
                stack.enter_context(replaced(block, _giver(links)))
        yield


def _giver(links: list[Any] | Any) -> Any:
    def give(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(enumerate(args)), **kwargs}
        return tuple(given.get(key) for key in links) if isinstance(links, list) else given[links]

    return give


def _links(model: nn.Module, first: nn.Module, second: nn.Module, kwargs: Kwargs) -> Any:
    """For each output of a block (or its one tensor) the argument by which the next block takes it."""
    left: list[Any] = []
    entered: list[dict[Any, Any]] = []
    handles = [
        first.register_forward_hook(lambda _, __, output: left.append(output)),
        second.register_forward_pre_hook(
            lambda _, args, given: entered.append({**dict(enumerate(args)), **given}), with_kwargs=True
        ),
    ]
    model(**kwargs)
    for handle in handles:
        handle.remove()

    def taker(value: Any) -> Any:
        return next((key for key, other in entered[0].items() if other is value and value is not None), None)

    return [taker(value) for value in left[0]] if isinstance(left[0], tuple) else taker(left[0])
