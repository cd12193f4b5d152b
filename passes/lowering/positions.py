"""Take the position tables out of a graph: they come in as inputs, and a module of their own computes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen

from ppcl_fx.errors import PpclError, Refusal
from ppcl_fx.ir.executor import buffers_on_meta, on_meta
from ppcl_fx.ir.graphs import ancestors
from ppcl_fx.passes.contract import Pass, Refused, Result
from ppcl_fx.tracing.guards import is_guard

POSITIONS = "positions"
"""Key of ``gm.meta`` under which the module that computes the tables is kept."""

_LOOKS = ("shape", "dtype", "device", "ndim", "size", "dim", "numel", "is_cuda", "layout")


@dataclass(frozen=True)
class PositionsAsInputs(Pass, name="positions-as-inputs", kind="rewrite", numerics="exact"):
    """Give what follows from Python arguments and sizes alone a place among the inputs.

    Each tensor that leaves those nodes (`position_nodes`) becomes an input, a complex one as its real view ``[..., 2]``
    with a ``view_as_complex`` behind it. ``gm.meta["positions"]`` becomes a graph module that takes the old inputs and
    returns the new ones, as a tuple in the order of their placeholders. A graph whose arguments are all tensors stays
    as it is: its positions are inputs already.
    """

    def requires(self, gm: GraphModule) -> None:
        if isinstance(gm.graph._codegen, _PyTreeCodeGen):
            raise Refusal(f"{self.name}: a graph of torch.export keeps its inputs; trace the model instead")

    def apply(self, gm: GraphModule) -> Result:
        inside = position_nodes(gm)
        leaving = [n for n in gm.graph.nodes if n in inside and any(u not in inside for u in n.users)]
        stuck = [n for n in leaving if not isinstance(n.meta.get("val"), torch.Tensor)]
        python = [n for n in gm.graph.find_nodes(op="placeholder") if not isinstance(n.meta.get("val"), torch.Tensor)]
        stuck += [n for n in python if any(user not in inside for user in n.users)]
        if stuck:
            reason = "a Python value is used together with tensors, so it cannot become a tensor input"
            return Result(gm, False, (Refused(self.name, reason, tuple(n.name for n in stuck)),))
        if not python:
            return Result(gm, False)
        gm.meta[POSITIONS] = _positions_module(gm, leaving, [n for n in gm.graph.nodes if n in inside and is_guard(n)])
        for node in leaving:
            _replace_by_input(gm, node, inside)
        for node in reversed(list(gm.graph.nodes)):
            if node in inside or node in python:
                gm.graph.erase_node(node)
        return Result(gm, True)


def position_nodes(gm: GraphModule) -> set[Node]:
    """Return the nodes that depend on a Python argument and on the values of no tensor argument."""
    inputs = gm.graph.find_nodes(op="placeholder")
    values = {node for node in inputs if isinstance(node.meta.get("val"), torch.Tensor)}
    python = set(inputs) - values
    for node in gm.graph.nodes:
        of_values = not values.isdisjoint(node.all_input_nodes)
        if of_values and looks_only(node):
            continue  # the size of what the graph computes is there when the graph runs
        if not python.isdisjoint(node.all_input_nodes):
            python.add(node)
        if of_values:
            values.add(node)
    return {node for node in python - values if node.op not in ("placeholder", "output")}


def looks_only(node: Node) -> bool:
    """Tell whether a node asks a tensor for its size, type or place, and not for its values."""
    if node.op == "call_function":
        if node.target is getattr:
            return node.args[1] in _LOOKS
        return node.target is len or str(getattr(node.target, "__name__", "")).startswith("sym_size")
    return node.op == "call_method" and node.target in _LOOKS


def _positions_module(gm: GraphModule, leaving: list[Node], checks: list[Node]) -> GraphModule:
    needed = ancestors([*leaving, *checks])
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder" or node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    real = {node for node in leaving if not node.meta["val"].is_complex()}
    results = [copies[n] if n in real else graph.call_function(torch.view_as_real, (copies[n],)) for n in leaving]
    graph.output(tuple(results))
    return GraphModule(gm, graph, class_name="Positions")


def _replace_by_input(gm: GraphModule, node: Node, inside: set[Node]) -> None:
    value: torch.Tensor = node.meta["val"]
    with gm.graph.inserting_after(gm.graph.find_nodes(op="placeholder")[-1]):
        new = table = gm.graph.placeholder(_name(gm, node))
    shape, dtype = value.shape, value.dtype
    if value.is_complex():
        shape, dtype = torch.Size((*shape, 2)), value.real.dtype
    table.meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
    if value.is_complex():
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(torch.view_as_complex, (table,))
        new.meta = {**node.meta}
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in inside)


def _name(gm: GraphModule, node: Node) -> str:
    """Name a table after the module that made it, ``pos_embed_0``, or else after its node."""
    source, index = node, ""
    while source.op == "call_function" and len(source.args) == 2 and isinstance(source.args[1], int):
        source, index = source.args[0], f"_{source.args[1]}{index}"  # type: ignore[assignment]
    taken = {n.name for n in gm.graph.nodes if n is not node}
    name = f"{source.name}{index}"
    return name if name not in taken else f"{name}_table"


def tables(gm: GraphModule, kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Compute the position inputs of a lowered graph, by name, from the arguments of the graph as it was before. Raises
    `PpclError`: an argument the tables depend on is missing.
    """
    positions = gm.meta.get(POSITIONS)
    if positions is None:
        return {}
    wanted = positions.graph.find_nodes(op="placeholder")
    missing = [n.target for n in wanted if n.users and n.target not in kwargs]
    if missing:
        raise PpclError(f"the position tables need the argument {missing[0]!r}; give it as in the recorded call")
    with torch.no_grad(), buffers_on_meta(positions, on_meta(kwargs)):
        found = positions(**{str(n.target): kwargs.get(str(n.target)) for n in wanted})
    taken = {n.target for n in wanted}
    names = [str(n.target) for n in gm.graph.find_nodes(op="placeholder") if n.target not in taken]
    return dict(zip(names, found, strict=True))
