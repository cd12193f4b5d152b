"""Run a graph node by node: quiet when it fails, and able to remember the shapes on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_map_only

Seen = tuple[tuple[int, ...], torch.dtype]
"""The shape and the type of a tensor."""


@contextmanager
def buffers_on_meta(module: nn.Module, wanted: bool) -> Iterator[None]:
    """Let a module whose parameters are on the meta device run there: its buffers, which are real, join them.

    Args:
        module: the module; afterwards it has its own buffers again.
        wanted: do nothing where this is false.
    """
    kept: list[tuple[nn.Module, str, torch.Tensor]] = []
    try:
        for child in module.modules() if wanted else ():
            for name, buffer in child._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    kept.append((child, name, buffer))
                    child._buffers[name] = buffer.to("meta")
        yield
    finally:
        for child, name, buffer in kept:
            child._buffers[name] = buffer


def on_meta(values: Mapping[str, Any]) -> bool:
    """Tell whether the tensors of a call are on the meta device."""
    return any(isinstance(value, torch.Tensor) and value.is_meta for value in values.values())


class ShapeRecorder(Interpreter):
    """Runs a graph and keeps shape and type of every tensor in `seen`."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.seen: dict[Node, Seen] = {}

    def run_node(self, n: Node) -> Any:
        """Run one node."""
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.seen[n] = (tuple(value.shape), value.dtype)
        return value


def run_graph(gm: GraphModule, kwargs: Mapping[str, Any]) -> tuple[Any, dict[Node, Seen]]:
    """Run a graph without gradients.

    Args:
        gm: the graph module.
        kwargs: its inputs by name; what it does not take is left out. On the meta device shapes alone are computed.

    Returns:
        Its first output, and shape and type of each node's tensor.
    """
    recorder = ShapeRecorder(gm)
    names = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
    with torch.no_grad(), buffers_on_meta(gm, on_meta(kwargs)):
        result = recorder.run(*(kwargs[name] for name in names))
    return (result[0] if isinstance(result, (tuple, list)) else result), recorder.seen


class _ExampleRefresher(Interpreter):
    """Runs a graph and notes on each node what its value looks like, as a trace does."""

    def run_node(self, n: Node) -> Any:
        """Run one node."""
        value = super().run_node(n)
        if n.op != "output":
            n.meta["val"] = tree_map_only(torch.Tensor, lambda t: t.detach().to("meta"), value)
        return value


def refresh_examples(gm: GraphModule, kwargs: Mapping[str, Any]) -> None:
    """Write new examples (``node.meta["val"]``) onto a graph whose weights changed their type.

    Args:
        gm: the graph module.
        kwargs: its inputs by name, in the new type.
    """
    refresher = _ExampleRefresher(gm)
    refresher.extra_traceback = False
    with torch.no_grad(), buffers_on_meta(gm, on_meta(kwargs)):
        refresher.run(*(kwargs[str(node.target)] for node in gm.graph.nodes if node.op == "placeholder"))
