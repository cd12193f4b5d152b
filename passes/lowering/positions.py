"""Take the position tables out of a graph: they come in as inputs, and a module of their own computes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen

from ppcl_fx.errors import PpclError, Refusal
from ppcl_fx.ir.executor import buffers_on_meta, on_meta
from ppcl_fx.ir.graphs import ancestors
from ppcl_fx.ir.stacks import stacks
from ppcl_fx.passes.contract import Pass, Refused, Result
from ppcl_fx.passes.lowering.complex_to_real import operation
from ppcl_fx.tracing.guards import is_guard

POSITIONS = "positions"
"""Key of ``gm.meta`` under which the module that computes the tables is kept."""

Form = Literal["tables", "nodes"]
"""How position inputs are cut and named; ``nodes`` is how earlier versions did both."""

_RESHAPING = ("unsqueeze", "squeeze", "transpose", "permute", "flatten", "view", "reshape", "movedim")
_VIEWS = (*_RESHAPING, "select", "narrow", "getitem", "slice")
_LOOKS = ("shape", "dtype", "device", "ndim", "size", "dim", "numel", "is_cuda", "layout")


@dataclass(frozen=True)
class PositionsAsInputs(Pass, name="positions-as-inputs", kind="rewrite", numerics="exact"):
    """Give what follows from Python arguments and sizes alone a place among the inputs.

    Each tensor that leaves those nodes (`position_nodes`) becomes an input, a complex one as its real view ``[..., 2]``
    with a ``view_as_complex`` behind it. What is a mere view of such a tensor stays in the graph. ``gm.meta
    ["positions"]`` becomes a graph module that takes the old inputs and returns the new ones, as a tuple in the order
    of their placeholders. A graph whose arguments are all tensors stays as it is: its positions are inputs already.

    Attributes:
        form: ``tables`` names an input for the stream that it belongs to and for what it is (``image_rotary``);
            ``nodes`` makes an input of every view too and names it after its node, as files of earlier versions have
            them.
    """

    form: Literal["tables", "nodes"] = "tables"

    def requires(self, gm: GraphModule) -> None:
        if isinstance(gm.graph._codegen, _PyTreeCodeGen):
            raise Refusal(f"{self.name}: a graph of torch.export keeps its inputs; trace the model instead")

    def apply(self, gm: GraphModule) -> Result:
        inside = position_nodes(gm)
        if self.form == "tables":
            inside -= _views(gm, inside)
        leaving = _leaving(gm, inside)
        stuck = [n for n in leaving if not isinstance(n.meta.get("val"), torch.Tensor)]
        python = [n for n in gm.graph.find_nodes(op="placeholder") if not isinstance(n.meta.get("val"), torch.Tensor)]
        stuck += [n for n in python if any(user not in inside for user in n.users)]
        if stuck:
            reason = "a Python value is used together with tensors, so it cannot become a tensor input"
            return Result(gm, False, (Refused(self.name, reason, tuple(n.name for n in stuck)),))
        if not python:
            return Result(gm, False)
        if self.form == "tables":
            _share(gm, inside)
            leaving = _leaving(gm, inside)
        gm.meta[POSITIONS] = _positions_module(gm, leaving, [n for n in gm.graph.nodes if n in inside and is_guard(n)])
        names = _names(gm, leaving) if self.form == "tables" else [_name_of_node(gm, node) for node in leaving]
        for node, name in zip(leaving, names, strict=True):
            _replace_by_input(gm, node, name, inside)
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


def _views(gm: GraphModule, inside: set[Node]) -> set[Node]:
    """Return the nodes that the graph computes from a table that is an input anyway."""
    leaving = _leaving(gm, inside)
    found: set[Node] = set()
    for node in leaving:
        chain = [*_chain(node, inside)]
        found |= {*chain[: max(place for place, one in enumerate(chain) if one in leaving)]}
    return found


def _leaving(gm: GraphModule, inside: set[Node]) -> list[Node]:
    return [n for n in gm.graph.nodes if n in inside and any(u not in inside for u in n.users)]


def _share(gm: GraphModule, inside: set[Node]) -> None:
    """Let nodes that compute the same of the same be one, so that equal tables are one input."""
    changes = ("setitem", "set_item", "iadd", "isub", "imul", "itruediv")
    nodes = [node for node in gm.graph.nodes if node in inside and node.op in ("call_function", "call_method")]
    if any(operation(node) in changes or str(node.target).endswith("_") for node in nodes):
        return  # what works in place may change what another node reads
    first: dict[str, Node] = {}
    for node in nodes:
        if isinstance(node.meta.get("val"), torch.Tensor):
            same = first.setdefault(f"{node.op} {node.target} {node.args} {node.kwargs}", node)
            if same is not node:
                node.replace_all_uses_with(same)


def _chain(node: Node, inside: set[Node]) -> Iterator[Node]:
    """Yield a node, and as long as it is a view with constant arguments the tensor that it is a view of."""
    yield node
    sources = node.all_input_nodes
    while operation(node) in _VIEWS and len(sources) == 1 and sources[0] in inside:
        node = sources[0]
        if not isinstance(node.meta.get("val"), torch.Tensor):
            return
        yield node
        sources = node.all_input_nodes


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


def _replace_by_input(gm: GraphModule, node: Node, name: str, inside: set[Node]) -> None:
    value: torch.Tensor = node.meta["val"]
    with gm.graph.inserting_after(gm.graph.find_nodes(op="placeholder")[-1]):
        new = table = gm.graph.placeholder(name)
    shape, dtype = value.shape, value.dtype
    if value.is_complex():
        shape, dtype = torch.Size((*shape, 2)), value.real.dtype
    table.meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
    if value.is_complex():
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(torch.view_as_complex, (table,))
        new.meta = {**node.meta}
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in inside)


def _name_of_node(gm: GraphModule, node: Node) -> str:
    """Name a table after the module that made it, ``pos_embed_0``, or else after its node."""
    source, index = node, ""
    while source.op == "call_function" and len(source.args) == 2 and isinstance(source.args[1], int):
        source, index = source.args[0], f"_{source.args[1]}{index}"  # type: ignore[assignment]
    taken = {n.name for n in gm.graph.nodes if n is not node}
    name = f"{source.name}{index}"
    return name if name not in taken else f"{name}_table"


def _names(gm: GraphModule, tables: list[Node]) -> list[str]:
    """Name tables for their streams and for what they are: ``image_rotary``, or ``text_rotary_cos`` of a pair. What a
    module with weights made, an embedding for example, is named after the module.
    """
    streams = _streams(gm)
    alike = Counter((node.meta["val"].shape, node.meta["val"].dtype, _origin(node)) for node in tables)
    names: list[str] = []
    for node in tables:
        value, origin = node.meta["val"], _origin(node)
        part = next((name for name in ("cos", "sin") if name in _operations(node)), "")
        pair = value.is_floating_point() and alike[value.shape, value.dtype, origin] == 2
        stream = next((streams[size] for size in value.shape[:-1] if size in streams), "")
        stem = "_".join(filter(None, (stream, "rotary" if value.is_complex() or part or pair else "positions", part)))
        if origin and next(gm.get_submodule(origin).parameters(), None) is not None:
            stem = origin.replace(".", "_")
        names.append(stem)
    taken = {str(node.target) for node in gm.graph.find_nodes(op="placeholder")}
    for place, stem in enumerate(names):
        ways = (stem, *(f"{stem}_{number}" for number in range(2, len(names) + len(taken) + 2)))
        names[place] = next(name for name in ways if name not in taken)
        taken.add(names[place])
    return names


def _origin(node: Node) -> str:
    """Return the path of the module that a table comes out of, alone or as one of several; nothing for other tables."""
    while operation(node) == "getitem" and isinstance(node.args[0], Node):
        node = node.args[0]
    return str(node.target) if node.op == "call_module" else ""


def _operations(node: Node) -> set[str]:
    """Return what was done to a table last: elementwise, or without touching its numbers."""
    found = set()
    while node.op in ("call_function", "call_method") and node.args and isinstance(node.args[0], Node):
        found.add(operation(node))
        if found & {"cos", "sin"}:
            break
        node = node.args[0]
    return found


def _streams(gm: GraphModule) -> dict[int, str]:
    """Return by its number of tokens in the example which stream a table belongs to, as far as the number tells."""
    try:
        found = [{name: _tokens(node) for name, node in stack.blocks[0].inputs.items()} for stack in stacks(gm)]
    except PpclError:
        return {}
    both = [one for one in found if {"image", "text"} <= one.keys()]
    sizes = {"image": {one["image"] for one in both or found if "image" in one}}
    sizes["text"] = {one["text"] for one in both} or {_tokens(n) for n in gm.graph.find_nodes(op="placeholder")}
    if not both:
        sizes["text"] -= sizes["image"]  # a text that blocks look at and do not change
    sizes["joint"] = {one["image"] + one["text"] for one in both}
    told = Counter(size for own in sizes.values() for size in own)
    return {size: name for name, own in sizes.items() for size in own if size and told[size] == 1}


def _tokens(node: Node) -> int:
    value = node.meta.get("val")
    return int(value.shape[1]) if isinstance(value, torch.Tensor) and value.ndim == 3 else 0


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
