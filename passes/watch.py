"""Run a traced graph and hand the values of chosen nodes to observers, keeping no value longer than
needed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_map

from ppcl_fx.errors import PpclError
from ppcl_fx.tracing import bind

Observer = Callable[..., None]


@dataclass(frozen=True, eq=False)
class Watch:
    """Calls `observer(*values)` with the values of `nodes` as soon as the last of them is known."""

    nodes: tuple[Node, ...]
    observer: Observer


class Watcher(Interpreter):
    """An interpreter of `gm` that serves watches; `watch(kwargs)` is one forward pass, without gradients.

    Values are freed after their last use in the graph, and after their last watch.
    """

    def __init__(self, gm: GraphModule, watches: Sequence[Watch]) -> None:
        super().__init__(gm)
        self._gm = gm
        self._by_node: dict[Node, list[Watch]] = defaultdict(list)
        for watch in watches:
            for node in dict.fromkeys(watch.nodes):
                if node.graph is not gm.graph:
                    raise RuntimeError(f"node {node.name} is not in the graph that runs")
                self._by_node[node].append(watch)
        self._device = next((p.device for p in gm.parameters()), torch.device("cpu"))
        self._missing: dict[Watch, set[Node]] = {}
        self._held: dict[Node, Any] = {}

    def watch(self, kwargs: Mapping[str, Any]) -> Any:
        """Run the graph on a call's keyword arguments and return its result.

        Raises:
            PpclError: an argument of the graph is not in `kwargs`; `GuardError` where the trace does not
                cover them.
        """
        self._missing = {watch: set(watch.nodes) for watches in self._by_node.values() for watch in watches}
        self._held = {}
        arguments = bound(self._gm, kwargs)
        with torch.no_grad():
            result = self.run(*(moved_to(value, self._device) for value in arguments))
        assert not self._held, "every watched node runs once"
        return result

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        watches = self._by_node.get(n)
        if watches:
            self._held[n] = value
            for watch in watches:
                self._missing[watch].discard(n)
                if not self._missing[watch]:
                    watch.observer(*(self._held[node] for node in watch.nodes))
                    del self._missing[watch]
            self._release()
        return value

    def _release(self) -> None:
        for node in list(self._held):
            if not any(watch in self._missing for watch in self._by_node[node]):
                del self._held[node]


def bound(gm: GraphModule, kwargs: Mapping[str, Any]) -> list[Any]:
    """The values of `gm`'s placeholders, in order, from a call's keyword arguments.

    Raises:
        PpclError: an argument is missing; `GuardError` where a traced model's fixed arguments differ from the
            call's.
    """
    # A graph of our own tracer knows which arguments it baked in; any other takes what its placeholders name.
    values = bind(gm, kwargs) if "ppcl" in gm.meta else dict(kwargs)
    out = []
    for node in gm.graph.find_nodes(op="placeholder"):
        name = str(node.target)
        if name not in values and not node.args:
            raise PpclError(
                f"the call lacks the argument {name!r} of the traced model; record the calls again"
            )
        out.append(values[name] if name in values else node.args[0])
    return out


def moved_to(value: Any, device: torch.device) -> Any:
    """Return nested values with every tensor on `device`."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, value)
