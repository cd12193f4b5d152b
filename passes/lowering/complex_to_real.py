"""Write complex arithmetic in real numbers: a complex tensor becomes a real one with a trailing dimension of two."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ppcl_fx.errors import PpclError
from ppcl_fx.ir.graphs import attribute
from ppcl_fx.passes.contract import Pass, Refused, Result
from ppcl_fx.tracing.guards import is_guard

Emit = Callable[..., Node]
"""Writes one call of a function into the graph and returns its node."""


@dataclass(frozen=True)
class ComplexToReal(Pass, name="complex-to-real", kind="rewrite", numerics="exact"):
    """Rewrite complex values as real ones ``[..., 2]``, real part first.

    A product is ``(ac - bd, ad + bc)`` of the parts, as PyTorch's own vectorised kernel computes it: equal to the bit
    where that kernel runs (rows of a multiple of eight complex numbers); in its scalar remainder PyTorch may fuse a
    product with the sum, which moves the last bit. Works on traced graphs and on exported (ATen) ones. A complex
    operation that the pass does not know refuses the whole graph, which then stays as it was.
    """

    def apply(self, gm: GraphModule) -> Result:
        found = complex_nodes(gm)
        users = {user for node in found for user in node.users}
        todo = [n for n in gm.graph.nodes if (n in found or n in users) and not is_guard(n)]
        # A tuple of complex numbers has no real form: `TuplesApart` and `PositionsAsInputs` come first.
        unknown = [n for n in todo if n.op != "get_attr" and (operation(n) not in RULES or _from_tuple(n, found))]
        if unknown:
            names = sorted({operation(n) for n in unknown})
            reason = f"no real form is known for {', '.join(names)} of complex numbers"
            return Result(gm, False, (Refused(self.name, reason, tuple(n.name for n in unknown)),))
        real: dict[Node, Node] = {}
        for node in todo:
            _rewrite(gm, node, found, real)
        for node in reversed(todo):
            gm.graph.erase_node(node)
        return Result(gm, bool(todo))

    def ensures(self, result: Result) -> None:
        if result.modified and complex_nodes(result.graph_module):
            raise RuntimeError("complex-to-real left a complex value in the graph")


def operation(node: Node) -> str:
    """Return the plain name of what a node does: ``mul`` for ``torch.mul``, ``x.mul``, ``*``, ``aten.mul.Tensor``."""
    if node.op == "call_function" and node.target is getattr:
        return f"getattr.{node.args[1]}"
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name.partition("::")[2]
    elif node.op in ("call_function", "call_method"):
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    else:
        name = node.op
    return name.rstrip("_")


def complex_nodes(gm: GraphModule) -> set[Node]:
    """Return the nodes whose value is a complex tensor, by their examples, or without one by what computes them."""
    found: set[Node] = set()
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        known = isinstance(value, torch.Tensor) and value.is_complex()
        if value is None and node.op in ("call_function", "call_method"):
            keeps = any(source in found for source in node.all_input_nodes) and operation(node) not in _TO_REAL
            known = keeps or operation(node) in ("view_as_complex", "complex")
        if known:
            found.add(node)
    return found


def _from_tuple(node: Node, found: set[Node]) -> bool:
    """Tell whether a complex value comes out of a tuple that a module gives."""
    source = node.args[0] if operation(node) == "getitem" else None
    return node in found and isinstance(source, Node) and source.op == "call_module"


def _rewrite(gm: GraphModule, node: Node, found: set[Node], real: dict[Node, Node]) -> None:
    def emit(function: Callable[..., Any], *args: Any) -> Node:
        new = gm.graph.call_function(function, args)
        new.meta = {key: value for key, value in node.meta.items() if key not in ("val", "tensor_meta")}
        if all(n.meta.get("val") is not None for n in new.all_input_nodes):
            new.meta["val"] = function(*map_arg(args, lambda n: n.meta["val"]))
        return new

    if node.op == "get_attr":
        real[node] = _real_constant(gm, node)
        return
    args = tuple(map_arg(node.args, lambda n: real.get(n, n)))
    which = tuple(isinstance(arg, Node) and arg in found for arg in node.args)
    with gm.graph.inserting_before(node):
        result = RULES[operation(node)](emit, args, dict(node.kwargs), which)
    if node in found:
        real[node] = result
    else:
        node.replace_all_uses_with(result)


def _real_constant(gm: GraphModule, node: Node) -> Node:
    value = attribute(gm, str(node.target))
    assert isinstance(value, torch.Tensor)
    name = f"{str(node.target).replace('.', '_')}_real"
    gm.register_buffer(name, torch.view_as_real(value.detach().resolve_conj()), persistent=False)
    with gm.graph.inserting_before(node):
        new = gm.graph.get_attr(name)
    new.meta = {**node.meta, "val": torch.empty((*value.shape, 2), dtype=value.real.dtype, device="meta")}
    return new


# ---- the rules: each gets the arguments in real form and says which of them were complex ------------------------


def _parts(emit: Emit, value: Any) -> list[Node]:
    return [emit(torch.select, value, -1, part) for part in (0, 1)]


def _mul(emit: Emit, args: Any, kwargs: Any, which: Any) -> Node:
    one, two = args
    if all(which):
        a, b, c, d = *_parts(emit, one), *_parts(emit, two)
        re = emit(torch.sub, emit(torch.mul, a, c), emit(torch.mul, b, d))
        im = emit(torch.add, emit(torch.mul, a, d), emit(torch.mul, b, c))
        return emit(torch.stack, [re, im], -1)
    pair, factor = (one, two) if which[0] else (two, one)
    tensor = isinstance(factor, Node) and not isinstance(factor.meta.get("val"), (int, float))
    return emit(torch.mul, pair, emit(torch.unsqueeze, factor, -1) if tensor else factor)


def _sum(function: Callable[..., Any]) -> Callable[..., Node]:
    def rule(emit: Emit, args: Any, kwargs: Any, which: Any) -> Node:
        if kwargs or len(args) != 2:
            raise PpclError(f"a complex {function.__name__} with a factor (alpha) cannot be exported; multiply first")
        if all(which):
            return emit(function, *args)
        re = emit(function, *(emit(torch.select, a, -1, 0) if own else a for a, own in zip(args, which, strict=True)))
        im = emit(torch.select, args[which.index(True)], -1, 1)
        im = emit(torch.neg, im) if function is torch.sub and which[1] else im
        return emit(torch.stack, [re, emit(torch.add, im, emit(torch.zeros_like, re))], -1)

    return rule


def _conj(emit: Emit, args: Any, kwargs: Any, which: Any) -> Node:
    re, im = _parts(emit, args[0])
    return emit(torch.stack, [re, emit(torch.neg, im)], -1)


def _plain(function: Callable[..., Any], *more: Any) -> Callable[..., Node]:
    """An operation that is the same on pairs; `more` are arguments after the tensor."""
    return lambda emit, args, kwargs, which: emit(function, args[0], *more)


def _shift(dim: Any) -> Any:
    """A dimension counted from the back moves one further: the last one is the pair."""
    if isinstance(dim, (tuple, list)):
        return tuple(_shift(item) for item in dim)
    return dim - 1 if isinstance(dim, int) and dim < 0 else dim


def _dims(function: Callable[..., Any], **defaults: int) -> Callable[..., Node]:
    """An operation on dimensions: `defaults` names its dimension arguments, in order."""

    def rule(emit: Emit, args: Any, kwargs: Any, which: Any) -> Node:
        given = dict(zip(defaults, args[1:], strict=False)) | kwargs
        return emit(function, args[0], *(_shift(given.get(name, default)) for name, default in defaults.items()))

    return rule


def _listed(function: Callable[..., Any], name: str, last: int) -> Callable[..., Node]:
    """An operation with a list of sizes or dimensions, which gets an entry more for the pair."""

    def rule(emit: Emit, args: Any, kwargs: Any, which: Any) -> Node:
        rest = kwargs.get(name, args[1:])
        given = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
        return emit(function, args[0], (*(_shift(given) if name == "dims" else given), last))

    return rule


def _getitem(emit: Emit, args: Any, kwargs: Any, which: Any) -> Node:
    index = args[1]
    parts = index if isinstance(index, tuple) else (index,)
    return emit(operator.getitem, args[0], (*parts, slice(None)) if Ellipsis in parts else index)


def _joined(function: Callable[..., Any]) -> Callable[..., Node]:
    def rule(emit: Emit, args: Any, kwargs: Any, which: Any) -> Node:
        given = dict(zip(("tensors", "dim"), args, strict=False)) | kwargs
        return emit(function, list(given["tensors"]), _shift(given.get("dim", 0)))

    return rule


def _same(emit: Emit, args: Any, kwargs: Any, which: Any) -> Node:
    return args[0]  # type: ignore[no-any-return]


def _expand(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return x.expand(shape)


def _select(emit: Emit, args: Any, kwargs: Any, which: Any) -> Node:
    given = dict(zip(("dim", "index"), args[1:], strict=False)) | kwargs
    return emit(torch.select, args[0], _shift(given["dim"]), given["index"])


def _slice(emit: Emit, args: Any, kwargs: Any, which: Any) -> Node:
    return emit(torch.ops.aten.slice.Tensor, args[0], *map(_shift, args[1:2]), *args[2:])


def _sizes(emit: Emit, args: Any, kwargs: Any, which: Any) -> Node:
    sizes = emit(operator.getitem, emit(getattr, args[0], "shape"), slice(None, -1))
    dim = [a for a in args[1:] if isinstance(a, int)] + list(kwargs.values())
    return emit(operator.getitem, sizes, dim[0]) if dim else sizes


_ALIKE: dict[str, Callable[..., Any]] = {
    "view_as_complex view_as_real resolve_conj detach": _same,
    "complex": lambda emit, args, kwargs, which: emit(torch.stack, list(args), -1),
    "mul imul": _mul,
    "add iadd": _sum(torch.add),
    "sub": _sum(torch.sub),
    "neg": _plain(torch.neg),
    "conj conj_physical _conj": _conj,
    "real getattr.real": _plain(torch.select, -1, 0),
    "imag getattr.imag": _plain(torch.select, -1, 1),
    "unsqueeze": _dims(torch.unsqueeze, dim=0),
    "squeeze": _dims(torch.squeeze, dim=0),
    "transpose": _dims(torch.transpose, dim0=0, dim1=1),
    "select": _select,
    "slice": _slice,
    "flatten": _dims(torch.flatten, start_dim=0, end_dim=-1),
    "permute": _listed(torch.permute, "dims", -1),
    "reshape view": _listed(torch.reshape, "shape", 2),
    "expand": _listed(_expand, "size", 2),
    "getitem": _getitem,
    "cat concat": _joined(torch.cat),
    "stack": _joined(torch.stack),
    "clone contiguous": _plain(torch.clone),
    "getattr.shape size": _sizes,
    "getattr.device": _plain(getattr, "device"),
}
RULES = {name: rule for names, rule in _ALIKE.items() for name in names.split()}
"""What each operation on complex numbers becomes, by its plain name."""

_TO_REAL = ("view_as_real", "real", "imag", "getattr.real", "getattr.imag", "getattr.shape", "getattr.dtype", "abs")
