"""Small questions about `torch.fx` graphs that several rooms ask."""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import PythonCode

_DYNAMO_PREFIX = re.compile(r"L\['self'\]\.?|__dict__\['_modules'\]|\._modules|_modules\['([^']*)'\]")
LINEAR = (torch.ops.aten.linear.default, torch.ops.aten.addmm.default, torch.nn.functional.linear)
"""The operations of a linear layer."""
_Kind = TypeVar("_Kind", bound=GraphModule)
_BRACKETS = re.compile(r"\['?([^'\]]*)'?\]")


def normal_path(path: str) -> str:
    """Write a module path the plain way, ``transformer_blocks.0.attn``, whichever front end made it."""
    if "[" not in path:
        return path
    path = _DYNAMO_PREFIX.sub(r".\1", path)
    path = _BRACKETS.sub(r".\1", path)
    return re.sub(r"\.+", ".", path).strip(".")


def module_paths(node: Node) -> list[str]:
    """Return the module paths a node was recorded in, outermost first, in plain writing."""
    stack = node.meta.get("nn_module_stack") or {}
    return [normal_path(entry[0]) for entry in stack.values()]


def users(node: Node) -> list[Node]:
    """Return a node's users in graph order."""
    return sorted(node.users)


def reached(
    nodes: Iterable[Node],
    step: Callable[[Node], Iterable[Node]],
    stop: Iterable[Node] = (),
    within: set[Node] | None = None,
) -> set[Node]:
    """Return what a walk by `step` comes to from some nodes, themselves included.

    It does not go beyond the nodes `stop`, and does not enter nodes outside of `within`, if that is given.
    """
    barrier, seen, todo = set(stop), set[Node](), list(nodes)
    while todo:
        node = todo.pop()
        if node in seen or (within is not None and node not in within):
            continue
        seen.add(node)
        if node not in barrier:
            todo.extend(step(node))
    return seen


def ancestors(nodes: Iterable[Node], stop: Iterable[Node] = (), within: set[Node] | None = None) -> set[Node]:
    """Return everything the given nodes are computed from, themselves included (see `reached`)."""
    return reached(nodes, lambda node: node.all_input_nodes, stop, within)


def descendants(nodes: Iterable[Node], stop: Iterable[Node] = ()) -> set[Node]:
    """Return everything computed from the given nodes, themselves included."""
    return reached(nodes, lambda node: node.users, stop)


def is_item(node: Node) -> bool:
    """Tell whether a node takes one item of a tuple, by its number."""
    return getattr(node.target, "__name__", "") == "getitem" and isinstance(node.args[1], int)


def is_add(node: Node) -> bool:
    """Tell whether a node is a two-operand addition of nodes, by whichever name."""
    aten = torch.ops.aten
    targets = (operator.add, operator.iadd, torch.add, aten.add.Tensor, aten.add_.Tensor, "add", "add_")
    named = node.op != "call_module" and node.target in targets
    return named and len(node.args) == 2 and all(isinstance(arg, Node) for arg in node.args)


def parameter_count(gm: GraphModule) -> int:
    """Count the parameters that a graph uses, each once."""
    return sum(parameter.numel() for parameter in used_parameters(gm))


def used_parameters(gm: GraphModule) -> list[torch.nn.Parameter]:
    """Return the parameters that a graph uses, each once; a module of the model may hold others."""
    seen: dict[int, torch.nn.Parameter] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            for parameter in gm.get_submodule(str(node.target)).parameters():
                seen[id(parameter)] = parameter
        elif node.op == "get_attr":
            value = attribute(gm, str(node.target))
            if isinstance(value, torch.nn.Parameter):
                seen[id(value)] = value
    return list(seen.values())


def attribute(gm: torch.nn.Module, path: str) -> object:
    """Return the attribute of a module at a dotted path."""
    value: object = gm
    for part in path.split("."):
        value = getattr(value, part)
    return value


def container(module: torch.nn.Module, without: tuple[str, ...] = ()) -> torch.nn.Module:
    """Return a plain module with what another holds, but buffers whose names begin as `without` says."""
    made = torch.nn.Module()
    for name, child in module.named_children():
        made.add_module(name, child)
    for name, parameter in module.named_parameters(recurse=False):
        made.register_parameter(name, parameter)
    for name, buffer in module.named_buffers(recurse=False):
        if not name.startswith(without):
            made.register_buffer(name, buffer)
    return made


class Draft(GraphModule):
    """A graph module that is still being edited: it has no code, so edits cost no compilation. See `finished`."""

    def recompile(self) -> PythonCode:
        """Write no code: nobody runs a draft."""
        return PythonCode("", {}, None)


def draft(gm: GraphModule) -> Draft:
    """Return a draft with a graph of its own over the modules and parameters of `gm`."""
    graph = Graph(tracer_cls=None)
    graph.set_codegen(copy.copy(gm.graph._codegen))  # an exported graph's says how arguments and results are nested
    result = graph.graph_copy(gm.graph, {})
    output = gm.graph.output_node()
    graph.output(result)
    graph.output_node().meta = dict(output.meta)
    return _over(gm, graph, Draft)


def finished(gm: Draft) -> GraphModule:
    """Return a draft as a graph module that runs, without the submodules that its graph does not use."""
    return _over(gm, gm.graph, GraphModule)


def copy_graph_module(gm: GraphModule) -> GraphModule:
    """Return a graph module with a graph of its own over the same modules and parameters."""
    return finished(draft(gm))


def copy_modules(gm: GraphModule) -> GraphModule:
    """Return a graph module with a graph and modules of its own over the same parameters and buffers."""
    made = copy.deepcopy(gm, {id(tensor): tensor for tensor in (*gm.parameters(), *gm.buffers())})
    made.meta = dict(gm.meta)
    return made


def _over(gm: GraphModule, graph: Graph, kind: type[_Kind]) -> _Kind:
    made = kind(gm, graph, class_name=gm.__class__.__name__)
    made.meta = {key: dict(value) if isinstance(value, dict) else value for key, value in gm.meta.items()}
    made.train(gm.training)
    return made
