"""Switches: the nodes at which a pluggable graph chooses between a teacher value and a student value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Graph, GraphModule, Node

from ppcl_fx.ir.liveness import SINK

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
    """Put a switch between a teacher value and its users, those left out that `keep` reading the teacher's value.

    `student` takes its place when the edit of this id is plugged; it belongs to the block of this path. `stream` is the
    stream that the value is, or ``z``.
    """
    graph = teacher.graph
    with graph.inserting_after(max(teacher, student)):  # nodes are ordered as the graph is
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


def under(node: Node) -> Node:
    """Return the teacher's value below a switch, or below several; any other node is its own."""
    while is_switch(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def is_depth(node: Node) -> bool:
    """Tell whether a switch is a depth edit's."""
    return str(node.args[2]).startswith("depth:")


def host(gm: GraphModule, node: Node) -> list[Node]:
    """Return the switches of the depth edit whose student a width edit's switch lies in; none outside of students."""
    path = node.meta[SWITCH]["block"]
    return [other for other in switches(gm) if is_depth(other) and other.meta[SWITCH]["block"] == path]


def student_end(gm: GraphModule, node: Node) -> tuple[Node, Node] | None:
    """Return where a student's projector comes out, for a width edit's switch: the student's value and the teacher's.

    A projector that gives a student's stream is to give what the teacher has there, as the student itself is, and not
    what the student had. None for any other switch: in a block of the teacher what it replaces is the teacher's
    value, and only a student knows what feeds its attention.
    """
    for other in host(gm, node):
        if other.meta[SWITCH]["stream"] == node.meta[SWITCH]["stream"]:
            return other.args[1], other.args[0]  # type: ignore[return-value]
    return None
