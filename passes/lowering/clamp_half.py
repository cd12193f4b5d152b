"""Keep what blocks pass on within the range of float16, as diffusers does in models that it runs in that type."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from ppcl_fx.ir.liveness import owner
from ppcl_fx.passes.contract import Pass, Result

END = float(torch.finfo(torch.float16).max)
"""The largest value of float16, 65504."""


@dataclass(frozen=True)
class ClampHalf(Pass, name="clamp-half", kind="rewrite", numerics="approximate"):
    """Clamp each float16 tensor that leaves a block to ±65504.

    Finite values stay as they are, to the bit; an infinity becomes the largest number, and so no NaN comes of it in the
    next norm. That this never happens on recorded calls is shown elsewhere (`ppcl_fx.export.onnx.half.check_range`).
    """

    def apply(self, gm: GraphModule) -> Result:
        found = [node for node in gm.graph.nodes if _leaves_block(node) and not _clamps(node)]
        for node in found:
            with gm.graph.inserting_after(node):
                clamped = gm.graph.call_function(torch.clamp, (node, -END, END))
            clamped.meta = dict(node.meta)
            node.replace_all_uses_with(clamped, delete_user_cb=lambda user, own=clamped: user is not own)
        return Result(gm, bool(found))


def _leaves_block(node: Node) -> bool:
    value, home = node.meta.get("val"), owner(node)
    half = isinstance(value, torch.Tensor) and value.dtype == torch.float16
    return half and home != "" and any(owner(user) != home for user in node.users)


def _clamps(node: Node) -> bool:
    return node.target is torch.clamp and node.args[1:] == (-END, END)
