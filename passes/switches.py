"""Switches: the nodes at which a pluggable graph chooses between a teacher value and a student value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Graph, GraphModule, Node

from ppcl_fx.passes.liveness import SINK

SWITCH = "ppcl_switch"


def switch(teacher: Any, student: Any, edit: str) -> Any:
    """Return the teacher's value: an unplugged pluggable graph computes what the teacher computes."""
    del student, edit
    return teacher


def is_switch(node: Node) -> bool:
    """Tell whether a node is a switch."""
    return node.op == "call_function" and node.target is switch


def switches(gm: GraphModule | Graph, edit: str | None = None) -> list[Node]:
    """Return the switches of a graph, in order; of one edit if given."""
    graph = gm.graph if isinstance(gm, GraphModule) else gm
    return [node for node in graph.nodes if is_switch(node) and edit in (None, node.args[2])]


def insert_switch(
    teacher: Node, student: Node, edit: str, block: str, stream: str, keep: Callable[[Node], bool] = lambda n: False
) -> Node:
    """Put a switch between a teacher value and its users.

    Args:
        teacher: the value as it was.
        student: what takes its place when the edit is plugged.
        edit: the edit's id.
        block: the path of the block that the student belongs to.
        stream: which stream the value is, or ``z``.
        keep: users that go on reading the teacher's value.
    """
    graph = teacher.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    with graph.inserting_after(max(teacher, student, key=lambda n: order[n])):
        node = graph.call_function(switch, (teacher, student, edit))
    node.meta = {"val": teacher.meta.get("val"), SWITCH: {"edit": edit, "block": block, "stream": stream}}
    teacher.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node and not keep(user))
    if teacher.meta.pop(SINK, False):
        node.meta[SINK] = True
    return node


def surface(node: Node) -> Node:
    """Return what a node's consumers see: the last of the switches laid over it."""
    while True:
        over = [user for user in node.users if is_switch(user) and user.args[0] is node]
        if not over:
            return node
        node = over[0]
