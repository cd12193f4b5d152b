"""Liveness: what keeps a node alive, which is the output, the model's own sinks, and effects of blocks in use."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ppcl_fx.ir.graphs import ancestors, is_item, module_paths, reached
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.tracing.guards import guards, is_guard

SINK = "ppcl_sink"
USED = "ppcl_used"


def mark(gm: GraphModule) -> None:
    """Note on the nodes what the model as traced computes without using it.

    A model may compute things for nothing (the text stream of the last block). They count as its parameters, so
    they must not vanish from a student of which they are still part. Marked once, before the first edit.
    """
    if graph_info(gm).get("marked"):
        return
    graph_info(gm)["marked"] = True
    needed = ancestors([gm.graph.output_node()])
    for node in gm.graph.nodes:
        wasted = node not in needed and node.op != "placeholder" and not _has_effect(node) and not _is_scalar(node)
        if wasted and all(_is_scalar(user) for user in node.users):
            node.meta[SINK] = True
        if node.op == "call_module" and isinstance(node.meta.get("val"), (tuple, list)):
            node.meta[USED] = used_items(node)


def used_items(node: Node) -> frozenset[int]:
    """Return which items of a tuple-valued node are read; guards on its length do not count."""
    read = [user for user in node.users if is_item(user) and (user.users or user.meta.get(SINK))]
    return frozenset(int(user.args[1]) for user in read)  # type: ignore[arg-type]


def owner(node: Node) -> str:
    """Return the block a node belongs to: the outermost numbered module, or the empty string."""
    for path in module_paths(node):
        if path.rpartition(".")[2].isdigit() or path.startswith("students."):
            return path
    return ""


def live(gm: GraphModule) -> set[Node]:
    """Return the nodes that must stay.

    Roots are the output, the inputs, and effects outside of blocks. A sink or an item assignment inside a block
    stays as long as the block computes anything else that is live. A guard stays as long as the tensors it looks at
    are there; it never keeps one alive.
    """
    waiting: dict[str, list[Node]] = {"": []}
    for node in gm.graph.nodes:
        if node.op in ("output", "placeholder"):
            waiting[""].append(node)
        elif not is_guard(node) and (_has_effect(node) or node.meta.get(SINK)):
            waiting.setdefault(owner(node), []).append(node)
    roots = waiting.pop("")
    seen = reached(roots, lambda node: [*node.all_input_nodes, *waiting.pop(owner(node), [])])
    for guard in guards(gm):
        chain = ancestors([guard], stop=seen)
        if all(_is_scalar(node) or node in seen for node in chain):
            seen |= chain
    return seen


def _is_scalar(node: Node) -> bool:
    """Tell whether a node only describes a value: a size, a dtype, a comparison of such."""
    value = node.meta.get("val")
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, torch.Size))


def _has_effect(node: Node) -> bool:
    """Tell whether a node does more than compute a value; to draw random numbers is none (a dropout)."""
    return bool(node.is_impure(impure_random=False))
