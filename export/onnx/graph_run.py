"""Run a graph node by node: quiet when it fails, and able to remember the shapes on the way.

Not the executor's run: nothing is cut or loaded here. It looks at every node, mostly without values, and takes what
is alike from other runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from ppcl_fx.export.onnx.segments import described
from ppcl_fx.ir.executor import buffers_on_meta, on_meta
from ppcl_fx.tracing.examples import map_tensors, signature

Seen = tuple[tuple[int, ...], torch.dtype]
"""The shape and the type of a tensor."""


@dataclass(frozen=True)
class _Known:
    """Results without values by what they were computed from, and what describes a module."""

    results: dict[Hashable, Any] = field(default_factory=dict)
    described: Callable[[nn.Module], str] = field(default_factory=lambda: functools.cache(described))


_KNOWN: ContextVar[_Known | None] = ContextVar("results without values", default=None)


@contextmanager
def alike_once() -> Iterator[None]:
    """Let `run_graph` compute what is alike, in blocks and in several runs, once while it works without values."""
    token = _KNOWN.set(_Known())
    try:
        yield
    finally:
        _KNOWN.reset(token)


class GraphRun(Interpreter):
    """Runs a graph without gradients, on inputs by name, and raises errors as they are."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.gm = gm

    def on(self, kwargs: Mapping[str, Any]) -> Any:
        """Return the graph's output; what it does not take is left out."""
        with torch.no_grad(), buffers_on_meta(self.gm, on_meta(kwargs)):
            return self.run(*(kwargs[str(node.target)] for node in self.gm.graph.find_nodes(op="placeholder")))


class _Shapes(GraphRun):
    """Keeps shape and type of every tensor in `seen`; results without values are taken from `known` where given."""

    def __init__(self, gm: GraphModule, known: _Known | None) -> None:
        super().__init__(gm)
        self.seen: dict[Node, Seen] = {}
        self.known = known

    def run_node(self, n: Node) -> Any:
        """Run one node, or take its result from one that was alike."""
        key = self._key(n, self.known) if self.known is not None else None
        results = self.known.results if self.known is not None and key is not None else {}
        if key in results:
            value = map_tensors(results[key], torch.Tensor.detach)  # an object of its own
        else:
            value = super().run_node(n)
            if key is not None and _without_values(value):
                results[key] = map_tensors(value, torch.Tensor.detach)
        if isinstance(value, torch.Tensor):
            self.seen[n] = (tuple(value.shape), value.dtype)
        return value

    def _key(self, n: Node, known: _Known) -> Hashable | None:
        """Return what decides the result of a node; None where it cannot be told."""
        if n.op not in ("call_function", "call_module"):
            return None
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        target = n.target if n.op == "call_function" else known.described(self.gm.get_submodule(str(n.target)))
        return signature(target, args, kwargs) if _without_values((args, kwargs)) else None


def _without_values(tree: Any) -> bool:
    """Tell whether all tensors in nested containers are on the meta device, where shapes decide what comes out."""
    return all(leaf.is_meta for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def run_graph(gm: GraphModule, kwargs: Mapping[str, Any]) -> tuple[Any, dict[Node, Seen]]:
    """Run a graph without gradients on inputs by name; on the meta device shapes alone are computed.

    Returns:
        Its first output, and shape and type of each node's tensor.
    """
    recorder = _Shapes(gm, _KNOWN.get() if on_meta(kwargs) else None)
    result = recorder.on(kwargs)
    return (result[0] if isinstance(result, (tuple, list)) else result), recorder.seen
