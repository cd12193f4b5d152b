"""Run a graph node by node: quiet when it fails, and able to remember the shapes on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_map_only

Seen = tuple[tuple[int, ...], torch.dtype]
"""The shape and the type of a tensor."""


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
        kwargs: its inputs by name; what it does not take is left out.

    Returns:
        Its first output, and shape and type of each node's tensor.
    """
    recorder = ShapeRecorder(gm)
    names = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
    with torch.no_grad():
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
    with torch.no_grad():
        refresher.run(*(kwargs[str(node.target)] for node in gm.graph.nodes if node.op == "placeholder"))
