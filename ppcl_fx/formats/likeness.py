"""Do two graphs compute the same? Told from the graphs alone, without weights and without running them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate, map_arg

from ppcl_fx.io.fingerprint import tensor_digest
from ppcl_fx.ir.graphs import ancestors, attribute
from ppcl_fx.tracing.guards import is_guard


def difference(one: GraphModule, two: GraphModule, rename: Callable[[str], str]) -> str:
    """Say where two graphs compute something different; an empty string where they do the same operations.

    Each value is described by what it is computed with and from, down to the inputs and parameters (`rename` gives a
    path in `one` its path in `two`), so the order in which a graph lists its nodes does not count. Operations with
    effects are compared in their order as well. Guards are left out: they compute nothing.
    """
    mine, other = _values(one, rename), _values(two, lambda path: path)
    if mine[one.graph.output_node()] == other[two.graph.output_node()] and _effects(one, mine) == _effects(two, other):
        return ""
    have, live = set(other.values()), ancestors([one.graph.output_node()])
    for node in one.graph.nodes:
        if node in live and mine[node] not in have:
            return f"{node.format_node() or node.name}"
    return "the order of operations with effects"


def _values(gm: GraphModule, rename: Callable[[str], str]) -> dict[Node, str]:
    """Return a hash of what each node computes."""
    found: dict[Node, str] = {}
    for node in gm.graph.nodes:
        if not is_guard(node):
            parts = (node.op, _target(gm, node, rename), _plain(node.args, found), _plain(node.kwargs, found))
            found[node] = hashlib.sha256(repr(parts).encode()).hexdigest()
    return found


def _effects(gm: GraphModule, values: dict[Node, str]) -> list[str]:
    impure: Iterable[Node] = (n for n in gm.graph.nodes if n.op not in ("placeholder", "output") and not is_guard(n))
    return [values[node] for node in impure if node.op != "call_module" and node.is_impure()]


def _target(gm: GraphModule, node: Node, rename: Callable[[str], str]) -> str:
    if node.op == "call_module":
        return f"{rename(str(node.target))} {gm.get_submodule(str(node.target))!r}"
    if node.op == "get_attr":
        value = attribute(gm, str(node.target))
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            # A constant has whatever name the tracer gave it.
            return str(tuple(value.shape)) if value.is_meta else tensor_digest(value)
        return rename(str(node.target))
    if callable(node.target):
        return f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__qualname__', node.target)}"
    return str(node.target)


def _plain(argument: Any, values: dict[Node, str]) -> object:
    """Return an argument with nodes replaced by their hashes, as something whose `repr` says all."""
    told = map_arg(argument, values.__getitem__)
    return map_aggregate(told, lambda item: "device" if isinstance(item, torch.device) else item)
