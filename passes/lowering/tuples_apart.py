"""Let only tensors, never tuples of them, travel between the nodes of a graph."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ppcl_fx.ir.graphs import is_item
from ppcl_fx.passes.contract import Pass, Result
from ppcl_fx.passes.lowering.expand import put


@dataclass(frozen=True)
class TuplesApart(Pass, name="tuples-apart", kind="rewrite", numerics="exact"):
    """Right behind a node whose value is a tuple of tensors put one ``getitem`` for each item, and use only those.

    Afterwards a graph can be cut anywhere and each value that crosses the cut is one tensor.
    """

    def apply(self, gm: GraphModule) -> Result:
        modified = False
        todo = list(gm.graph.nodes)
        while todo:  # the items of a tuple may be tuples again
            node = todo.pop(0)
            if node._erased or node.op in ("placeholder", "output") or not holds_tensors(node.meta.get("val")):
                continue
            before = set(node.users)
            if _apart(gm, node):
                modified = True
                todo = [*(new for new in node.users if new not in before), *todo]
        return Result(gm, modified)


def holds_tensors(value: Any) -> bool:
    """Tell whether a value is a non-empty plain tuple or list in which every item is a tensor or such a tuple."""
    if not isinstance(value, (tuple, list)) or isinstance(value, torch.Size):
        return False
    return bool(value) and all(isinstance(item, torch.Tensor) or holds_tensors(item) for item in value)


def _apart(gm: GraphModule, node: Node) -> bool:
    value = node.meta["val"]
    readers = [user for user in node.users if is_item(user)]
    others = [user for user in node.users if user not in readers]
    behind = [node]
    while behind[-1].next in readers:
        behind.append(behind[-1].next)
    indices = {int(user.args[1]) % len(value) for user in readers}  # type: ignore[arg-type]
    if not others and set(readers) == set(behind[1:]) and len(readers) == len(indices):
        return False  # already apart
    items = {}
    with gm.graph.inserting_after(node):
        for index in reversed(range(len(value)) if others else sorted(indices)):
            item = gm.graph.call_function(operator.getitem, (node, index))
            item.meta = {**node.meta, "val": value[index]}
            item.meta.pop("block_out", None)
            items[index] = item
    for user in readers:
        item = items[int(user.args[1]) % len(value)]  # type: ignore[arg-type]
        item.meta = {**user.meta, **item.meta}  # it is of the tuple's block, not of a reader's
        user.replace_all_uses_with(item)
        gm.graph.erase_node(user)
    rebuilt = type(value)(items[index] for index in range(len(value))) if others else ()
    for user in others:
        put(user, node, rebuilt)
    return True
