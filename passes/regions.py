"""Copying the nodes of a block under a new module path."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from torch.fx import Node
from torch.fx.node import map_arg

from ppcl_fx.tracing.guards import is_guard


def copy_nodes(nodes: Iterable[Node], after: Node, old: str, new: str) -> dict[Node, Node]:
    """Copy nodes behind another node; module targets and paths below `old` become paths below `new`.

    Guards are not copied: the copies answer to the same inputs as the nodes they were copied from.

    Returns:
        Original node -> copy.
    """
    copies: dict[Node, Node] = {}
    graph = after.graph
    at = after
    for node in nodes:
        if is_guard(node):
            continue
        target = node.target
        if node.op in ("call_module", "get_attr"):
            target = moved(str(target), old, new)
        with graph.inserting_after(at):
            copy = graph.create_node(
                node.op,
                target,
                map_arg(node.args, lambda n: copies.get(n, n)),
                map_arg(node.kwargs, lambda n: copies.get(n, n)),
                name=f"student_{node.name}",
            )
        copy.meta = _moved_meta(node, old, new)
        copies[node] = at = copy
    return copies


def moved(path: str, old: str, new: str) -> str:
    """Return a dotted path with the prefix `old` replaced by `new`."""
    return new + path[len(old) :] if path == old or path.startswith(f"{old}.") else path


def _moved_meta(node: Node, old: str, new: str) -> dict[str, object]:
    meta = {key: value for key, value in node.meta.items() if key not in ("block_in", "ppcl")}
    stack = OrderedDict()
    for _, (path, kind) in (node.meta.get("nn_module_stack") or {}).items():
        stack[moved(path, old, new)] = (moved(path, old, new), kind)
    meta["nn_module_stack"] = stack
    noted = tuple((new, position) for path, position in node.meta.get("block_out", ()) if path == old)
    if noted:
        meta["block_out"] = noted
    else:
        meta.pop("block_out", None)
    return meta
