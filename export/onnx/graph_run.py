"""Run a graph node by node: quiet when it fails, and able to remember the shapes on the way.

Not the executor's run: nothing is cut or loaded here. It looks at every node, mostly without values, takes what is
alike from other runs, and goes on after a guard that breaks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_map_only

from ppcl_fx.errors import GuardError
from ppcl_fx.export.onnx.meta_results import MetaResults
from ppcl_fx.ir.executor import buffers_on_meta, on_meta

Seen = tuple[tuple[int, ...], torch.dtype]
"""The shape and the type of a tensor."""

_RESULTS: ContextVar[MetaResults | None] = ContextVar("results without values", default=None)


@contextmanager
def alike_once() -> Iterator[None]:
    """Let `run_graph` compute what is alike, in blocks and in several runs, once while it works without values."""
    token = _RESULTS.set(MetaResults())
    try:
        yield
    finally:
        _RESULTS.reset(token)


class ShapeRecorder(Interpreter):
    """Runs a graph and keeps shape and type of every tensor in `seen`.

    Args:
        gm: the graph.
        known: results without values, used again and added to; None to compute each.
    """

    def __init__(self, gm: GraphModule, known: MetaResults | None = None) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.seen: dict[Node, Seen] = {}
        self.known = known

    def run_node(self, n: Node) -> Any:
        """Run one node, or take its result from one that was alike."""
        key = None
        if self.known is not None and n.op in ("call_function", "call_module"):
            target = self.fetch_attr(n.target) if n.op == "call_module" else n.target  # type: ignore[arg-type]
            key = self.known.key(target, *self.fetch_args_kwargs_from_env(n))
        value = self.known.get(key) if self.known is not None else None
        if value is None:
            value = super().run_node(n)
            if self.known is not None:
                self.known.add(key, value)
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
    meta = on_meta(kwargs)
    recorder = ShapeRecorder(gm, _RESULTS.get() if meta else None)
    names = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
    with torch.no_grad(), buffers_on_meta(gm, meta):
        result = recorder.run(*(kwargs[name] for name in names))
    return (result[0] if isinstance(result, (tuple, list)) else result), recorder.seen


class _ExampleRefresher(Interpreter):
    """Runs a graph and notes on each node what its value looks like, as a trace does, and which guards break."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.broken: list[Node] = []

    def run_node(self, n: Node) -> Any:
        """Run one node."""
        try:
            value = super().run_node(n)
        except GuardError:
            self.broken.append(n)
            return None
        if n.op != "output":
            n.meta["val"] = tree_map_only(torch.Tensor, lambda t: t.detach().to("meta"), value)
        return value


def refresh_examples(gm: GraphModule, kwargs: Mapping[str, Any]) -> None:
    """Write new examples (``node.meta["val"]``) onto a graph whose weights changed their type.

    A guard that now breaks is one on the type: the call is that of the trace but for it. It goes, and the graph
    computes in the new type what was traced in the old one. (Some models clamp in float16 alone; `ClampHalf` does that
    for all.)

    Args:
        gm: the graph module.
        kwargs: the inputs by name that it was traced with, or others that it takes, in the new type.
    """
    refresher = _ExampleRefresher(gm)
    with torch.no_grad(), buffers_on_meta(gm, on_meta(kwargs)):
        refresher.run(*(kwargs[str(node.target)] for node in gm.graph.nodes if node.op == "placeholder"))
    for guard in refresher.broken:
        gm.graph.erase_node(guard)
    if refresher.broken:
        gm.recompile()
