"""Look inside a module that the trace left whole."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten, tree_leaves

from ppcl_fx.errors import PpclError
from ppcl_fx.ir.liveness import SINK, USED, used_items
from ppcl_fx.passes.contract import Pass, Result
from ppcl_fx.tracing import trace_inside
from ppcl_fx.tracing.guards import expect_tensor

_TRACED: ContextVar[dict[Any, tuple[nn.Module, GraphModule | None]] | None] = ContextVar("traced insides", default=None)


@contextmanager
def traced_once() -> Iterator[None]:
    """Let `Expand` trace a module once for all graphs that hold it. The modules must stay as they are meanwhile."""
    token = _TRACED.set({})
    try:
        yield
    finally:
        _TRACED.reset(token)


def _lost_items(node: Node) -> bool:
    return USED in node.meta and used_items(node) < node.meta[USED]


def _works_with_complex(node: Node) -> bool:
    values = tree_leaves([node.meta.get("val"), *(source.meta.get("val") for source in node.all_input_nodes)])
    return any(isinstance(value, torch.Tensor) and value.is_complex() for value in values)


@dataclass(frozen=True)
class Expand(Pass, name="expand", kind="rewrite", numerics="exact"):
    """Replace ``call_module`` nodes by the traced inside of their module, down to `torch.nn` modules.

    A module whose inside cannot be traced from shapes alone stays whole.

    Attributes:
        which: ``lost`` means modules with results that were used when the model was traced and are not any more (an
            attention whose text output nobody reads, a modulation whose feed-forward is gone), ``complex`` those that
            take or return complex tensors.
        modules: paths of the modules to expand instead.
    """

    which: Literal["lost", "complex"] = "lost"
    modules: frozenset[str] = frozenset()

    def apply(self, gm: GraphModule) -> Result:
        wanted = _lost_items if self.which == "lost" else _works_with_complex
        chosen = [
            node
            for node in gm.graph.nodes
            if node.op == "call_module" and (node.target in self.modules if self.modules else wanted(node))
        ]
        chosen = [n for n in chosen if sum(other.target == n.target for other in gm.graph.nodes) == 1]
        chosen = [n for n in chosen if _opens(gm.get_submodule(str(n.target)))]
        opened = [_splice(gm, node) for node in chosen]
        return Result(gm, any(opened))


def _opens(module: nn.Module) -> bool:
    """Tell whether to look into a module: a graph module is for `Inline`."""
    return not isinstance(module, GraphModule) and not type(module).__module__.startswith("torch.nn")


def _splice(gm: GraphModule, node: Node) -> bool:
    path = str(node.target)
    module = gm.get_submodule(path)
    bound = inspect.signature(module.forward).bind(*node.args, **node.kwargs)
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = inspect.signature(module.forward).parameters[name].kind
        arguments |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    inner = _inside(module, map_arg(arguments, lambda n: n.meta["val"]))
    if inner is None:
        return False  # what it computes depends on values that no example has: it stays whole
    values: dict[Node, Any] = {}
    with gm.graph.inserting_before(node):
        for old in inner.graph.nodes:
            if old.op == "placeholder":
                values[old] = arguments[str(old.target)]
            elif old.op == "output":
                result = map_values(old.args[0], values)
            elif old.target is not expect_tensor:  # the outer graph has checked its inputs already
                values[old] = _copy_in(gm, inner, node, path, old, values)
    _replace(gm, node, result)
    # From now on the path is a container of the graph module's own; the module itself belongs to the teacher.
    container = nn.Module()
    for name, child in inner.named_children():
        container.add_module(name, child)
    for name, parameter in inner.named_parameters(recurse=False):
        container.register_parameter(name, parameter)
    for name, buffer in inner.named_buffers(recurse=False):
        if not name.startswith("_constant_"):
            container.register_buffer(name, buffer)
    gm.set_submodule(path, container)
    return True


def _inside(module: nn.Module, arguments: dict[str, Any]) -> GraphModule | None:
    """Return the traced inside of a module; None where it cannot be traced."""
    known = _TRACED.get()
    key = _key(module, arguments) if known is not None else None
    if known is not None and key in known:
        return known[key][1]
    try:
        inner = trace_inside(module, arguments)
    except PpclError:
        inner = None
    if known is not None and key is not None:
        known[key] = (module, inner)
    return inner


def _key(module: nn.Module, arguments: dict[str, Any]) -> Any:
    """Return what decides how the inside of a module looks; None where that cannot be compared."""
    leaves, spec = tree_flatten(arguments)
    forms = [
        (v.shape, v.stride(), v.dtype, v.device) if isinstance(v, torch.Tensor) else (type(v), v) for v in leaves
    ]
    key = (id(module), repr(spec), tuple(forms))
    return key if all(isinstance(form, Hashable) for form in (*forms, *(form[-1] for form in forms))) else None


def _copy_in(gm: GraphModule, inner: GraphModule, at: Node, path: str, old: Node, values: dict[Node, Any]) -> Node:
    target: Any = old.target
    if old.op == "get_attr" and str(target).startswith("_constant_"):
        target = f"{path.replace('.', '_')}{target}"
        gm.register_buffer(target, getattr(inner, str(old.target)), persistent=False)
    elif old.op in ("call_module", "get_attr"):
        target = f"{path}.{target}"
    new = gm.graph.create_node(
        old.op, target, map_values(tuple(old.args), values), map_values(dict(old.kwargs), values), name=old.name
    )
    new.meta = dict(old.meta)
    stack = OrderedDict(at.meta.get("nn_module_stack", {}))
    for inside, kind in (old.meta.get("nn_module_stack") or {}).values():
        stack[f"{path}.{inside}"] = (f"{path}.{inside}", kind)
    new.meta["nn_module_stack"] = stack
    return new


def _replace(gm: GraphModule, node: Node, result: Any) -> None:
    """Point the users of a module's node to the values from its inside."""
    if isinstance(result, Node):
        if node.meta.get(SINK):
            result.meta[SINK] = True
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):
            if getattr(user.target, "__name__", "") == "getitem" and isinstance(user.args[1], int):
                item = result[user.args[1]]
                if isinstance(item, Node):
                    if user.meta.get(SINK):
                        item.meta[SINK] = True
                    user.replace_all_uses_with(item)
                    gm.graph.erase_node(user)
                    continue
            user.args = map_arg_to(user.args, node, result)
            user.kwargs = map_arg_to(user.kwargs, node, result)
    gm.graph.erase_node(node)


def map_values(argument: Any, values: dict[Node, Any]) -> Any:
    """Replace nodes in an argument by anything, containers included (`map_arg` allows nodes only)."""
    if isinstance(argument, Node):
        return values[argument]
    if isinstance(argument, tuple) and not isinstance(argument, torch.Size):
        return tuple(map_values(item, values) for item in argument)
    if isinstance(argument, list):
        return [map_values(item, values) for item in argument]
    if isinstance(argument, dict):
        return {key: map_values(item, values) for key, item in argument.items()}
    if isinstance(argument, slice):
        return slice(*(map_values(item, values) for item in (argument.start, argument.stop, argument.step)))
    return argument


def map_arg_to(argument: Any, old: Node, new: Any) -> Any:
    """Replace one node in an argument by a value that may be a container."""
    nodes: list[Node] = []

    def note(node: Node) -> Node:
        nodes.append(node)
        return node

    map_arg(argument, note)
    plain = tuple(argument) if isinstance(argument, tuple) else dict(argument)
    return map_values(plain, {**{n: n for n in nodes}, old: new})
