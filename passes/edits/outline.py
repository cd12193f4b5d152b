"""Two views of one graph: inlined (every node visible) and outlined (each block a module of its own graph)."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from ppcl_fx.errors import Refusal
from ppcl_fx.ir.graphs import container
from ppcl_fx.ir.partition import carve
from ppcl_fx.ir.stacks import block_regions
from ppcl_fx.passes.contract import Pass, Result


@dataclass(frozen=True)
class Outline(Pass, name="outline", kind="rewrite", numerics="exact"):
    """Turn each block into one ``call_module`` of its own `GraphModule`, at the block's own path.

    What sharding, gradient checkpointing, block streaming and timing want to see. `Inline` is the way back.
    State-dict names stay as they are.
    """

    def apply(self, gm: GraphModule) -> Result:
        regions = block_regions(gm).items()
        found = {path: nodes for path, nodes in regions if not any(_calls_graph(gm, node) for node in nodes)}
        for path, nodes in found.items():
            _inside(gm, path, nodes)  # all of them or none
        for path, nodes in found.items():
            outline(gm, path, nodes)
        return Result(gm, bool(found))


@dataclass(frozen=True)
class Inline(Pass, name="inline", kind="rewrite", numerics="exact"):
    """Put the nodes of every module that is a `GraphModule` back into the graph."""

    def apply(self, gm: GraphModule) -> Result:
        found = [node for node in gm.graph.nodes if _calls_graph(gm, node)]
        for node in found:
            _inline(gm, node)
        return Result(gm, bool(found))


def outline(gm: GraphModule, path: str, nodes: Sequence[Node]) -> Node:
    """Move nodes, in graph order, into a graph module at `path` and return the node that calls it. Raises `Refusal`:
    something between the nodes needs their values, or they call a module from elsewhere.
    """
    inside = _inside(gm, path, nodes)
    members, last = set(inside), inside[-1]
    carved = carve(inside)
    outputs = carved.outputs
    for node in carved.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = str(node.target).removeprefix(f"{path}.")
    carved.graph.output(tuple(carved.values[node] for node in outputs))
    module = GraphModule(gm.get_submodule(path), carved.graph, class_name="Block")
    module.train(gm.training)

    with gm.graph.inserting_after(last):
        call = gm.graph.call_module(path, tuple(carved.inputs))
    stack = OrderedDict({path: (path, GraphModule)})
    call.meta = {"val": tuple(node.meta.get("val") for node in outputs), "nn_module_stack": stack}
    at = call
    for index, node in enumerate(outputs):
        with gm.graph.inserting_after(at):
            at = gm.graph.call_function(operator.getitem, (call, index))
        at.meta = {**node.meta, "nn_module_stack": stack}
        node.replace_all_uses_with(at, delete_user_cb=lambda user: user not in members)
    for node in reversed(inside):
        gm.graph.erase_node(node)
    gm.set_submodule(path, module)
    return call


def _inside(gm: GraphModule, path: str, nodes: Sequence[Node]) -> list[Node]:
    """Return those of some nodes that go into a module at `path`, or raise `Refusal`."""
    inside = [node for node in nodes if node.op != "get_attr" or str(node.target).startswith(f"{path}.")]
    members = set(inside)
    for node in inside:
        if node.op == "call_module" and not str(node.target).startswith(f"{path}."):
            raise Refusal(f"{path} cannot be outlined: {node.name} calls {node.target}, which lies outside of it")
    early = [user for node in inside for user in node.users if user not in members and user < inside[-1]]
    if early:
        raise Refusal(f"{path} cannot be outlined: {early[0].name} stands between its nodes and uses them")
    return inside


def _calls_graph(gm: GraphModule, node: Node) -> bool:
    return node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), GraphModule)


def _inline(gm: GraphModule, call: Node) -> None:
    path = str(call.target)
    inner = gm.get_submodule(path)
    assert isinstance(inner, GraphModule)
    values: dict[Node, Any] = {}
    arguments = iter(call.args)
    with gm.graph.inserting_before(call):
        for node in inner.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(arguments)
            elif node.op == "output":
                results = node.args[0]
            else:
                values[node] = gm.graph.node_copy(node, values.__getitem__)
                if node.op in ("call_module", "get_attr"):
                    values[node].target = f"{path}.{node.target}"
    assert isinstance(results, (tuple, list))
    for user in list(call.users):
        index = user.args[1]
        assert user.target is operator.getitem and isinstance(index, int)
        user.replace_all_uses_with(values[results[index]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)
    gm.set_submodule(path, container(inner))
