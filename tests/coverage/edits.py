"""What each edit must compute, written as eager code on the model itself: no graph is looked at."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ppcl_fx.ir.graphs import ancestors, descendants
from ppcl_fx.ir.sites import FfnSite, TextSite
from ppcl_fx.ir.stacks import Block
from ppcl_fx.schema.plan import DepthEdit


@contextlib.contextmanager
def shortened(model: nn.Module, edits: Sequence[DepthEdit]) -> Iterator[None]:
    """Let the blocks after the first of each interval return what the first one returned."""
    with contextlib.ExitStack() as stack:
        for edit in edits:
            first, *others = (
                model.get_submodule(f"{edit.stack}.{i}") for i in range(edit.first, edit.last + 1)
            )
            remembered: list[Any] = []
            stack.enter_context(replaced(first, _remembering(first.forward, remembered)))
            for block in others:
                stack.enter_context(replaced(block, lambda *_, known=remembered, **__: known[-1]))
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
                stack.enter_context(replaced(module, _silenced(module.forward)))
                silenced.add(module)
        yield


def _silenced(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: torch.zeros_like(forward(*args, **kwargs))


@contextlib.contextmanager
def without_text(
    model: nn.Module, sites: Sequence[TextSite], z: Sequence[nn.Module], state: nn.Module
) -> Iterator[None]:
    """Let blocks compute without a text stream of their own (Eq. 8): what a text-stream edit must compute.

    Args:
        model: the model.
        sites: the text streams of the source block and of those that lose theirs. They say which module is a block's
            attention, which of its arguments is the normed text, and which of the block's outputs is the text state.
        z: for each block after the source, the map that is added to the source's normed text.
        state: the map that is added to the source's text state, in the last block.
    """
    known: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for site, own in zip(sites, [None, *z], strict=True):
            attention, block = (model.get_submodule(p) for p in (str(site.attention.target), site.block))
            stack.enter_context(replaced(attention, _with_text(attention.forward, site, known, own)))
            last = state if site is sites[-1] else None
            stack.enter_context(replaced(block, _with_state(block.forward, site, known, own is None, last)))
        yield


def _with_text(
    forward: Callable[..., Any], site: TextSite, known: dict[str, Any], own: nn.Module | None
) -> Callable[..., Any]:
    positions = [i for i, value in enumerate(site.attention.args) if value is site.z]
    names = [name for name, value in site.attention.kwargs.items() if value is site.z]

    def attend(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(enumerate(args)), **kwargs}
        if own is None:
            known["z"] = given[(positions + names)[0]]
            return forward(*args, **kwargs)
        given |= dict.fromkeys(positions + names, known["z"] + own(known["z"]))
        return forward(*(given[i] for i in range(len(args))), **{name: given[name] for name in kwargs})

    return attend


def _with_state(
    forward: Callable[..., Any], site: TextSite, known: dict[str, Any], source: bool, last: nn.Module | None
) -> Callable[..., Any]:
    at = next(position for owner, position in site.leaving.meta["block_out"] if owner == site.block)

    def compute(*args: Any, **kwargs: Any) -> Any:
        outputs = list(forward(*args, **kwargs))
        if source:
            known["state"] = outputs[at]
        else:
            outputs[at] = known["state"] if last is None else known["state"] + last(known["state"])
        return tuple(outputs)

    return compute


@contextlib.contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a module another forward for a while."""
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
