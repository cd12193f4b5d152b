"""The partition of a graph at its blocks: into segments to run one after the other, and into modules of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.split_module import split_module

from ppcl_fx.ir.graphs import attribute, reached
from ppcl_fx.ir.liveness import owner
from ppcl_fx.ir.switches import is_switch
from ppcl_fx.tracing.guards import guards


@dataclass(frozen=True, eq=False)
class Watch:
    """Calls `observer(*values)` with the values of `nodes` as soon as the last of them is known."""

    nodes: tuple[Node, ...]
    observer: Callable[..., None]


@dataclass(frozen=True, eq=False)
class Segment:
    """A run of nodes between two cuts, in order, and the names of the parameters and buffers that it needs.

    `label` is the block that it begins with, if any. `constants` are the ``get_attr`` nodes that it reads, for itself;
    `leaving` are the values that later segments need. For each node `drops` has the values that nobody needs after it,
    and `due` the watches whose last value it is.
    """

    label: str
    nodes: tuple[Node, ...]
    constants: tuple[Node, ...]
    tensors: tuple[str, ...]
    leaving: tuple[Node, ...]
    drops: dict[Node, tuple[Node, ...]]
    due: dict[Node, tuple[Watch, ...]]


def parts(nodes: Iterable[Node], between: bool = False) -> dict[Node, int]:
    """Return the number of the part that each node is in, from 0; `nodes` are in order.

    Blocks are cut along the order of the nodes, since a projector may stand between a block's nodes. What stands
    between two blocks is a part of its own if `between`; else it goes with the first of them.
    """
    number, current = 0, None if between else ""
    part: dict[Node, int] = {}
    for node in nodes:
        block = owner(node)
        if block != current and (block or between):
            number, current = number + (current is not None), block
        part[node] = number
    return part


def grouped(part: Mapping[Node, int]) -> list[list[Node]]:
    """Return the nodes of each part, by what `parts` returned."""
    found: list[list[Node]] = [[] for _ in range(max(part.values(), default=-1) + 1)]
    for node, number in part.items():
        found[number].append(node)
    return found


def segmented(gm: GraphModule) -> GraphModule:
    """Return a graph whose parts are modules over the same parameters: for gradient checkpointing and compilation."""
    part = parts(gm.graph.nodes)
    return split_module(gm, gm, lambda node: part[node])


def regions(gm: GraphModule) -> dict[str, list[Node]]:
    """Return the nodes of each block and student by its path, in graph order, wherever they stand."""
    found: dict[str, list[Node]] = {}
    for node in gm.graph.nodes:
        if owner(node):
            found.setdefault(owner(node), []).append(node)
    return found


class Carved(NamedTuple):
    """Copies of some nodes in a graph of their own, without an output."""

    graph: Graph
    values: dict[Node, Node]
    """Node of the whole -> node of this graph."""
    inputs: list[Node]
    """The nodes of the whole whose values it takes, in the order of its placeholders."""
    outputs: list[Node]
    """Those of the nodes that others use."""


def carve(nodes: Sequence[Node]) -> Carved:
    """Copy nodes, which are in graph order, into a graph of their own."""
    members = set(nodes)
    inputs = list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in members))
    outputs = [node for node in nodes if any(user not in members for user in node.users)]
    graph = Graph(tracer_cls=None)
    values: dict[Node, Node] = {}
    for source in inputs:
        values[source] = graph.placeholder(source.name)
        values[source].meta = {"val": source.meta.get("val")}
    for node in nodes:
        if node.op != "output":
            values[node] = graph.node_copy(node, values.__getitem__)
    return Carved(graph, values, inputs, outputs)


def reads(node: Node) -> list[Node]:
    """Return the nodes whose values a node needs; of a switch only the teacher's, which is the one it gives."""
    if is_switch(node):
        assert isinstance(node.args[0], Node)
        return [node.args[0]]
    return node.all_input_nodes


def closure(gm: GraphModule, nodes: Sequence[Node]) -> set[Node]:
    """Return what must run to get the values of `nodes` from a pluggable graph that computes what its teacher does.

    Guards that look at nothing else belong to it, and so does what writes into a value that does.
    """
    checks = set(guards(gm))
    writers = [n for n in gm.graph.nodes if n.op == "call_function" and n.is_impure() and n not in checks]
    needed, todo = set[Node](), list(nodes)
    while todo:
        needed |= reached(todo, reads)
        todo = [n for n in writers if n not in needed and n.all_input_nodes and n.all_input_nodes[0] in needed]
    needed.update(gm.graph.find_nodes(op="placeholder"))
    return needed | reached([n for n in checks if all(_settled(s, needed) for s in n.all_input_nodes)], reads)


def _settled(node: Node, needed: set[Node]) -> bool:
    """Tell whether a value follows from needed ones by questions about them alone: sizes, lengths, comparisons."""
    if node in needed:
        return True
    if isinstance(node.meta.get("val"), Tensor) or node.op in ("get_attr", "call_module"):
        return False
    return all(_settled(other, needed) for other in reads(node))


def cut(
    gm: GraphModule, watches: Sequence[Watch] = (), skip: Callable[[Node], bool] = lambda node: False
) -> list[Segment]:
    """Cut a graph in segments.

    Watched values live until their watches are served. Nodes to `skip` are not run; nobody else may need their values.
    """
    nodes = [node for node in gm.graph.nodes if not skip(node)]
    part = parts(nodes)
    due: dict[Node, tuple[Watch, ...]] = {}
    for watch in watches:
        at = max(watch.nodes)
        due[at] = (*due.get(at, ()), watch)
    last: dict[Node, Node] = {}
    for node in nodes:
        for value in (node, *reads(node), *(n for watch in due.get(node, ()) for n in watch.nodes)):
            last[value] = node
    segments = []
    for number in range(max(part.values()) + 1):
        inside = [node for node in nodes if part[node] == number and node.op != "get_attr"]
        watched = [n for node in inside for watch in due.get(node, ()) for n in watch.nodes]
        read = [n for node in inside for n in reads(node)]
        constants = dict.fromkeys(n for n in (*read, *watched) if n.op == "get_attr")
        leaving = [n for n in nodes if n.op != "get_attr" and part[n] <= number < part[last[n]]]
        drops: dict[Node, tuple[Node, ...]] = {}
        for value, end in last.items():
            if value.op != "get_attr" and part[end] == number:
                drops[end] = (*drops.get(end, ()), value)
        segments.append(
            Segment(
                label=next((owner(node) for node in inside if owner(node)), ""),
                nodes=tuple(inside),
                constants=tuple(constants),
                tensors=tuple(_tensors(gm, [*inside, *constants])),
                leaving=tuple(leaving),
                drops=drops,
                due={node: due[node] for node in inside if node in due},
            )
        )
    return segments


def _tensors(gm: GraphModule, nodes: Sequence[Node]) -> list[str]:
    names: list[str] = []
    for node in nodes:
        target = str(node.target)
        if node.op == "call_module":
            module = gm.get_submodule(target)
            names += [f"{target}.{name}" for name, _ in (*module.named_parameters(), *module.named_buffers())]
        elif node.op == "get_attr" and attribute(gm, target) is not None:
            names.append(target)
    return list(dict.fromkeys(names))
