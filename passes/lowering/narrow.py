"""Drop the output rows of linear layers that nothing reads: a modulation whose second half lost its feed-forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ppcl_fx.ir.graphs import LINEAR, is_item
from ppcl_fx.ir.liveness import SINK
from ppcl_fx.passes.contract import Pass, Refused, Result

_ROWS = "_ppcl_rows"
_VERSIONS = "_ppcl_versions"


def rows_of(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the views of original weights that a tensor is made of, one behind the other; by default itself."""
    return cast(tuple[torch.Tensor, ...], getattr(tensor, _ROWS, (tensor,)))


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
class Narrow(Pass, name="narrow", kind="rewrite", numerics="approximate"):
    """Shrink linear layers whose output is cut into equal chunks of which some are unused.

    Rows that stay and lie together are a view of the original weight; others are copied. In real arithmetic the result
    is the same; a smaller matrix product may round differently, so the pass calls itself approximate.
    """

    def apply(self, gm: GraphModule) -> Result:
        narrowed, refused = False, []
        for chunk in list(gm.graph.nodes):
            if not _is_chunk(chunk):
                continue
            used = sorted({int(user.args[1]) for user in chunk.users if user.users or user.meta.get(SINK)})
            linear = chunk.args[0]
            if not 0 < len(used) < chunk.args[1] or not (linear.op == "call_module" or linear.target in LINEAR):
                continue
            reason = _obstacle(gm, linear, chunk)
            if reason:
                refused.append(Refused(self.name, reason, (linear.name, chunk.name)))
            else:
                _shrink(gm, linear, chunk, used)
                narrowed = True
        return Result(gm, narrowed, refused)


def _is_chunk(node: Node) -> bool:
    if node.target not in ("chunk", torch.chunk, torch.ops.aten.chunk.default) or len(node.args) < 2:
        return False
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    value = node.args[0].meta.get("val") if isinstance(node.args[0], Node) else None
    last = isinstance(value, torch.Tensor) and dim in (-1, value.ndim - 1) and isinstance(node.args[1], int)
    return last and all(is_item(user) for user in node.users)


def _obstacle(gm: GraphModule, linear: Node, chunk: Node) -> str:
    """Return why a node cannot lose the rows that nothing reads; nothing where it can."""
    if list(linear.users) != [chunk]:
        return "another node reads the whole of it"
    if linear.op == "call_module":
        calls = [n for n in linear.graph.nodes if n.op == "call_module" and n.target == linear.target]
        module = gm.get_submodule(str(linear.target))
        # A subclass (a quantised layer, a LoRA wrapper) may not be a plain matrix.
        if len(calls) > 1 or type(module) is not nn.Linear:
            return "it is called twice, or no plain linear layer"
    elif linear.target is not torch.ops.aten.linear.default or not all(
        node.op == "get_attr" and list(node.users) == [linear] for node in _weights(linear)
    ):
        return "its weights are not its own parameters"
    return "" if linear.meta["val"].shape[-1] % chunk.args[1] == 0 else "its chunks are not of one size"


def _weights(linear: Node) -> list[Node]:
    """Return the nodes of the weight and of the bias, if any, of a linear operation."""
    return [node for node in linear.args[1:] if isinstance(node, Node)]


def _shrink(gm: GraphModule, linear: Node, chunk: Node, used: list[int]) -> None:
    count = chunk.args[1]
    assert isinstance(count, int)
    size = linear.meta["val"].shape[-1] // count
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

    with torch.no_grad():
        if linear.op == "call_module":
            module = gm.get_submodule(str(linear.target))
            assert isinstance(module, nn.Linear)
            with torch.device("meta"):
                small = nn.Linear(module.in_features, size * len(used), bias=module.bias is not None)
            small.weight = cut(module.weight)
            if module.bias is not None:
                small.bias = cut(module.bias)
            small.train(module.training)
            gm.set_submodule(str(linear.target), small)
        for node in _weights(linear) if linear.op == "call_function" else ():
            owner, _, name = str(node.target).rpartition(".")
            parameter = cut(gm.get_parameter(str(node.target)))
            setattr(gm.get_submodule(owner), name, parameter)
            node.meta["val"] = parameter.detach().to("meta")
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
