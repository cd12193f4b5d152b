"""Drop the output rows of linear layers that nothing reads: a modulation whose second half lost its feed-forward."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ppcl_fx.passes.contract import Pass, Result
from ppcl_fx.passes.liveness import SINK

_ROWS = "_ppcl_rows"
_VERSIONS = "_ppcl_versions"


def rows_of(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the views of original weights that a tensor is made of, one behind the other; by default itself."""
    found: tuple[torch.Tensor, ...] = getattr(tensor, _ROWS, (tensor,))
    return found


def is_copied(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a copy of rows that lie apart in an original weight, and not a view of it."""
    return hasattr(tensor, _ROWS)


def is_outdated(copied: torch.Tensor) -> bool:
    """Whether the weight that a tensor was copied from has been written to since."""
    return bool(getattr(copied, _VERSIONS) != _versions(rows_of(copied)))


def copy_again(copied: torch.Tensor) -> None:
    """Copy the rows that a tensor is made of into it once more."""
    rows = rows_of(copied)
    with torch.no_grad():
        copied.copy_(torch.cat(rows))
    setattr(copied, _VERSIONS, _versions(rows))


def _versions(tensors: tuple[torch.Tensor, ...]) -> list[int]:
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


@dataclass(frozen=True)
class Narrow(Pass):
    """Shrink linear layers whose output is cut into equal chunks of which some are unused.

    Rows that stay and lie together are a view of the original weight; others are copied. In real arithmetic the result
    is the same; a smaller matrix product may round differently, so the pass calls itself approximate.
    """

    name: ClassVar[str] = "narrow"
    numerics: ClassVar[Literal["exact", "approximate"]] = "approximate"

    def apply(self, gm: GraphModule) -> Result:
        narrowed = False
        for chunk in list(gm.graph.nodes):
            if not _is_chunk(chunk):
                continue
            linear = chunk.args[0]
            used = sorted({int(user.args[1]) for user in chunk.users if user.users or user.meta.get(SINK)})
            pieces = chunk.args[1]
            assert isinstance(pieces, int)
            if _shrinkable(gm, linear, chunk) and 0 < len(used) < pieces:
                _shrink(gm, linear, chunk, used)
                narrowed = True
        return Result(gm, narrowed)


def _is_chunk(node: Node) -> bool:
    if node.target not in ("chunk", torch.chunk) or len(node.args) < 2 or not isinstance(node.args[1], int):
        return False
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    value = node.args[0].meta.get("val") if isinstance(node.args[0], Node) else None
    last = isinstance(value, torch.Tensor) and dim in (-1, value.ndim - 1)
    return last and all(u.target is operator.getitem and isinstance(u.args[1], int) for u in node.users)


def _shrinkable(gm: GraphModule, linear: Any, chunk: Node) -> bool:
    if linear.op != "call_module" or list(linear.users) != [chunk]:
        return False
    calls = [n for n in linear.graph.nodes if n.op == "call_module" and n.target == linear.target]
    module = gm.get_submodule(str(linear.target))
    # A subclass (a quantised layer, a LoRA wrapper) may not be a plain matrix.
    pieces = chunk.args[1]
    assert isinstance(pieces, int)
    return len(calls) == 1 and type(module) is nn.Linear and module.out_features % pieces == 0


def _shrink(gm: GraphModule, linear: Node, chunk: Node, used: list[int]) -> None:
    module = gm.get_submodule(str(linear.target))
    assert isinstance(module, nn.Linear)
    count = chunk.args[1]
    assert isinstance(count, int)
    size = module.out_features // count
    rows = [slice(index * size, (index + 1) * size) for index in used]
    contiguous = used == list(range(used[0], used[-1] + 1))

    def cut(tensor: torch.Tensor) -> nn.Parameter:
        # One slice is a view and shares the teacher's memory.
        if contiguous:
            return nn.Parameter(tensor[rows[0].start : rows[-1].stop], requires_grad=tensor.requires_grad)
        views = tuple(tensor.detach()[row] for row in rows)
        whole = nn.Parameter(torch.cat(views), requires_grad=tensor.requires_grad)
        setattr(whole, _ROWS, views)  # an export refers to the rows where they lie
        setattr(whole, _VERSIONS, _versions(views))
        return whole

    with torch.device("meta"):
        small = nn.Linear(module.in_features, size * len(used), bias=module.bias is not None)
    with torch.no_grad():
        small.weight = cut(module.weight)
        if module.bias is not None:
            small.bias = cut(module.bias)
    small.train(module.training)
    gm.set_submodule(str(linear.target), small)
    linear.meta["val"] = torch.cat([torch.chunk(linear.meta["val"], count, -1)[index] for index in used], -1)
    places = {index: place for place, index in enumerate(used)}
    for user in list(chunk.users):
        index = int(user.args[1])  # type: ignore[arg-type]
        if index not in places:
            chunk.graph.erase_node(user)
        elif len(used) == 1:
            user.replace_all_uses_with(linear)
            chunk.graph.erase_node(user)
        else:
            user.args = (chunk, places[index])
    if len(used) == 1:
        chunk.graph.erase_node(chunk)
    else:
        chunk.args = (linear, len(used), *chunk.args[2:])
        chunk.meta["val"] = torch.chunk(linear.meta["val"], len(used), -1)
