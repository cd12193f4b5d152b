"""What each edit must compute, written as eager code on the model itself: no graph is looked at."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ppcl_fx.graphs import ancestors, descendants
from ppcl_fx.plan import DepthEdit
from ppcl_fx.sites import FfnSite
from ppcl_fx.stacks import Block


@contextlib.contextmanager
def shortened(model: nn.Module, edits: Sequence[DepthEdit]) -> Iterator[None]:
    """Let the blocks after the first of each interval return what the first one returned."""
    with contextlib.ExitStack() as stack:
        for edit in edits:
            first, *others = (
                model.get_submodule(f"{edit.stack}.{i}") for i in range(edit.first, edit.last + 1)
            )
            remembered: list[Any] = []
            stack.enter_context(_replaced(first, _remembering(first.forward, remembered)))
            for block in others:
                stack.enter_context(_replaced(block, lambda *_, known=remembered, **__: known[-1]))
        yield


def _remembering(forward: Callable[..., Any], remembered: list[Any]) -> Callable[..., Any]:
    def remember(*args: Any, **kwargs: Any) -> Any:
        remembered.append(forward(*args, **kwargs))
        return remembered[-1]

    return remember


@contextlib.contextmanager
def without_feed_forwards(model: nn.Module, sites: Sequence[tuple[Block, FfnSite]]) -> Iterator[None]:
    """Let the last module of each feed-forward return zeros: what a projector of zeros must compute."""
    with contextlib.ExitStack() as stack:
        silenced: set[nn.Module] = set()
        for block, site in sites:
            branch = ancestors([site.after], stop=[site.before], within=set(block.nodes)) & descendants([site.before])
            called = [n for n in block.nodes if n in branch and n.op == "call_module"]
            module = next(
                m for node in reversed(called) if list((m := model.get_submodule(str(node.target))).parameters())
            )
            if module not in silenced:  # one module may serve both streams
                stack.enter_context(_replaced(module, _silenced(module.forward)))
                silenced.add(module)
        yield


def _silenced(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: torch.zeros_like(forward(*args, **kwargs))


@contextlib.contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
