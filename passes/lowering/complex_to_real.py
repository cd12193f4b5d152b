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

    A product is ``(ac - bd, ad + bc)`` of the parts, as PyTorch's own vectorised kernel computes it: equal to the
    bit where that kernel runs (rows of a multiple of eight complex numbers); in its scalar remainder PyTorch may
    fuse a product with the sum, which moves the last bit. Works on traced graphs and on exported (ATen) ones.

    A complex operation the pass does not know refuses the whole graph, which then stays as it was.
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
        if isinstance(value, torch.Tensor):
            if value.is_complex():
                found.add(node)
        elif value is None and node.op in ("call_function", "call_method"):
            makes = operation(node) in ("view_as_complex", "complex")
            keeps = any(source in found for source in node.all_input_nodes) and operation(node) not in _TO_REAL
            if makes or keeps:
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
    if not hasattr(gm, name):
        gm.register_buffer(name, torch.view_as_real(value.detach().resolve_conj()), persistent=False)
    with gm.graph.inserting_before(node):
        new = gm.graph.get_attr(name)
    new.meta = {**node.meta, "val": torch.empty((*value.shape, 2), dtype=value.real.dtype, device="meta")}
    return new


# ---- the rules: each gets the arguments in real form and says which of them were complex ------------------------


def _mul(emit: Emit, args: Any, kwargs: Any, which: Any) -> Node:
    one, two = args
    if all(which):
        a, b, c, d = (emit(torch.select, x, -1, part) for x in (one, two) for part in (0, 1))
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
        return emit(torch.stack, _parts_with_real(emit, function, args, which), -1)

    return rule


def _parts_with_real(emit: Emit, function: Callable[..., Any], args: Any, which: Any) -> list[Node]:
    """Real and imaginary part of a sum or difference of a complex and a real number."""
    re = [emit(torch.select, arg, -1, 0) if is_complex else arg for arg, is_complex in zip(args, which, strict=True)]
    first = emit(function, *re)
    im = emit(torch.select, args[which.index(True)], -1, 1)
    im = emit(torch.neg, im) if function is torch.sub and which[1] else im
    return [first, emit(torch.add, im, emit(torch.zeros_like, first))]


def _conj(emit: Emit, args: Any, kwargs: Any, which: Any) -> Node:
    re, im = (emit(torch.select, args[0], -1, part) for part in (0, 1))
    return emit(torch.stack, [re, emit(torch.neg, im)], -1)


def _part(index: int) -> Callable[..., Node]:
    return lambda emit, args, kwargs, which: emit(torch.select, args[0], -1, index)


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


def _listed(args: Any, kwargs: Any, name: str) -> list[Any]:
    rest = kwargs.get(name, args[1:])
    return list(rest[0]) if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else list(rest)


def _shaped(function: Callable[..., Any], name: str) -> Callable[..., Node]:
    return lambda emit, args, kwargs, which: emit(function, args[0], (*_listed(args, kwargs, name), 2))


def _permute(emit: Emit, args: Any, kwargs: Any, which: Any) -> Node:
    return emit(torch.permute, args[0], (*_shift(_listed(args, kwargs, "dims")), -1))


def _getitem(emit: Emit, args: Any, kwargs: Any, which: Any) -> Node:
    index = args[1]
    parts = index if isinstance(index, tuple) else (index,)
    return emit(operator.getitem, args[0], (*parts, slice(None)) if Ellipsis in parts else index)


def _joined(function: Callable[..., Any]) -> Callable[..., Node]:
    def rule(emit: Emit, args: Any, kwargs: Any, which: Any) -> Node:
        tensors = args[0] if args else kwargs["tensors"]
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        return emit(function, list(tensors), _shift(dim))

    return rule


def _same(emit: Emit, args: Any, kwargs: Any, which: Any) -> Node:
    return args[0]  # type: ignore[no-any-return]


def _expand(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return x.expand(shape)


def _select(emit: Emit, args: Any, kwargs: Any, which: Any) -> Node:
    given = dict(zip(("dim", "index"), args[1:], strict=False)) | kwargs
    dim, index = given["dim"], given["index"]
    return emit(torch.select, args[0], _shift(dim), index)


def _slice(emit: Emit, args: Any, kwargs: Any, which: Any) -> Node:
    return emit(torch.ops.aten.slice.Tensor, args[0], *map(_shift, args[1:2]), *args[2:])


def _sizes(emit: Emit, args: Any, kwargs: Any, which: Any) -> Node:
    sizes = emit(operator.getitem, emit(getattr, args[0], "shape"), slice(None, -1))
    dim = [a for a in args[1:] if isinstance(a, int)] + list(kwargs.values())
    return emit(operator.getitem, sizes, dim[0]) if dim else sizes


def _contiguous(emit: Emit, args: Any, kwargs: Any, which: Any) -> Node:
    return emit(torch.clone, args[0])


RULES: dict[str, Callable[..., Any]] = {
    "view_as_complex": _same,
    "view_as_real": _same,
    "complex": lambda emit, args, kwargs, which: emit(torch.stack, list(args), -1),
    "mul": _mul,
    "imul": _mul,
    "add": _sum(torch.add),
    "iadd": _sum(torch.add),
    "sub": _sum(torch.sub),
    "neg": lambda emit, args, kwargs, which: emit(torch.neg, args[0]),
    "conj": _conj,
    "conj_physical": _conj,
    "_conj": _conj,
    "resolve_conj": _same,
    "real": _part(0),
    "imag": _part(1),
    "getattr.real": _part(0),
    "getattr.imag": _part(1),
    "unsqueeze": _dims(torch.unsqueeze, dim=0),
    "squeeze": _dims(torch.squeeze, dim=0),
    "transpose": _dims(torch.transpose, dim0=0, dim1=1),
    "select": _select,
    "slice": _slice,
    "flatten": _dims(torch.flatten, start_dim=0, end_dim=-1),
    "permute": _permute,
    "reshape": _shaped(torch.reshape, "shape"),
    "view": _shaped(torch.reshape, "shape"),
    "expand": _shaped(_expand, "size"),
    "getitem": _getitem,
    "cat": _joined(torch.cat),
    "concat": _joined(torch.cat),
    "stack": _joined(torch.stack),
    "clone": _contiguous,
    "contiguous": _contiguous,
    "detach": _same,
    "getattr.shape": _sizes,
    "size": _sizes,
    "getattr.device": lambda emit, args, kwargs, which: emit(getattr, args[0], "device"),
}
"""What each operation on complex numbers becomes, by its plain name."""

_TO_REAL = ("view_as_real", "real", "imag", "getattr.real", "getattr.imag", "getattr.shape", "getattr.dtype", "abs")
