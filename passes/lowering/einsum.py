"""Write an Einstein sum that only moves dimensions as a permutation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from ppcl_fx.passes.contract import Pass, Result

_EINSUM = (torch.einsum, torch.ops.aten.einsum.default)


@dataclass(frozen=True)
class EinsumToPermute(Pass, name="einsum-to-permute", kind="rewrite", numerics="exact"):
    """Replace an Einstein sum of one tensor that sums nothing (an unpatchify) by ``permute``, which gives that view.

    ONNX has no ``Einsum`` for bfloat16. Other sums stay as they are.
    """

    def apply(self, gm: GraphModule) -> Result:
        todo = [(node, _order(node)) for node in gm.graph.nodes if node.target in _EINSUM]
        for node, order in todo:
            if order is not None:
                node.args, node.kwargs = (_operands(node)[0], order), {}
                node.target = torch.permute
        return Result(gm, any(order is not None for _, order in todo))


def _operands(node: Node) -> list[object]:
    first = node.args[1]
    return list(first) if isinstance(first, (tuple, list)) else list(node.args[1:])


def _order(node: Node) -> tuple[int, ...] | None:
    """Return the order of dimensions that a sum gives; None where it does more than that."""
    given, arrow, result = str(node.args[0]).replace(" ", "").partition("->")
    moves = bool(arrow) and given.isalpha() and len(set(given)) == len(given) and sorted(given) == sorted(result)
    if not moves or len(_operands(node)) != 1:
        return None
    return tuple(given.index(label) for label in result)
