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
from ppcl_fx.ir.graphs import container, is_item
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


def _wanted(node: Node, which: str) -> bool:
    """Tell whether results of a module were lost, or whether it works with complex numbers."""
    if which == "lost":
        return USED in node.meta and used_items(node) < node.meta[USED]
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
        calls = gm.graph.find_nodes(op="call_module")
        chosen = [
            node
            for node in calls
            if (node.target in self.modules if self.modules else _wanted(node, self.which))
            and sum(other.target == node.target for other in calls) == 1
            and _opens(gm.get_submodule(str(node.target)))
        ]
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
        kind = bound.signature.parameters[name].kind
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
                result = map_arg(old.args[0], values.__getitem__)
            elif old.target is not expect_tensor:  # the outer graph has checked its inputs already
                _copy_in(gm, inner, node, path, old, values)
    _replace(gm, node, result)
    # From now on the path is a container of the graph module's own; the module itself belongs to the teacher.
    gm.set_submodule(path, container(inner, without=("_constant_",)))
    return True


def _inside(module: nn.Module, arguments: dict[str, Any]) -> GraphModule | None:
    """Return the traced inside of a module; None where it cannot be traced."""
    shared, key = _TRACED.get(), _key(module, arguments)
    known = {} if shared is None else shared
    if key not in known:
        try:
            inner = trace_inside(module, arguments)
        except PpclError:
            inner = None
        if key is None:
            return inner
        known[key] = (module, inner)
    return known[key][1]


def _key(module: nn.Module, arguments: dict[str, Any]) -> Any:
    """Return what decides how the inside of a module looks; None where that cannot be compared."""
    leaves, spec = tree_flatten(arguments)
    forms = [(v.shape, v.stride(), v.dtype, v.device) if isinstance(v, torch.Tensor) else (type(v), v) for v in leaves]
    key = (id(module), repr(spec), tuple(forms))
    return key if all(isinstance(form, Hashable) for form in (*forms, *(form[-1] for form in forms))) else None


def _copy_in(gm: GraphModule, inner: GraphModule, at: Node, path: str, old: Node, values: dict[Node, Any]) -> None:
    new = values[old] = gm.graph.node_copy(old, values.__getitem__)
    if old.op == "get_attr" and str(old.target).startswith("_constant_"):
        new.target = f"{path.replace('.', '_')}{old.target}"
        gm.register_buffer(new.target, getattr(inner, str(old.target)), persistent=False)
    elif old.op in ("call_module", "get_attr"):
        new.target = f"{path}.{old.target}"
    stack = OrderedDict(at.meta.get("nn_module_stack", {}))
    for inside, kind in (old.meta.get("nn_module_stack") or {}).values():
        stack[f"{path}.{inside}"] = (f"{path}.{inside}", kind)
    new.meta["nn_module_stack"] = stack


def _replace(gm: GraphModule, node: Node, result: Any) -> None:
    """Point the users of a module's node to the values from its inside."""
    for user in [node] if isinstance(result, Node) else list(node.users):
        value = result[user.args[1]] if user is not node and is_item(user) else result
        if isinstance(value, Node):
            if user.meta.get(SINK):
                value.meta[SINK] = True
            user.replace_all_uses_with(value)
            gm.graph.erase_node(user)
        else:
            put(user, node, result)
    if not node._erased:
        gm.graph.erase_node(node)


def put(user: Node, old: Node, new: Any) -> None:
    """Let a node read a value, or a container of some, in the place of another node."""
    user.args, user.kwargs = map_arg((user.args, user.kwargs), lambda node: new if node is old else node)
