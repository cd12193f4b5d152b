"""Make an ONNX graph one that engines fuse: each result computed once, and the rotary embedding as one operator."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from ppcl_fx.export.fusing.rotary import fuse_rotary


def fuse(model: ir.Model) -> tuple[int, dict[str, str]]:
    """Rewrite a stitched model in place: share equal results, and fuse rotations.

    ``Attention`` and ``RMSNormalization`` are there already: PyTorch's translation writes them. Sharing is exact; a
    ``RotaryEmbedding`` does the same products and sums in the same type as what it stands for.

    Returns:
        What `fuse_rotary` says of the rotations.
    """
    share = CommonSubexpressionEliminationPass()
    share(model)
    found = fuse_rotary(model)
    share(model)
    RemoveUnusedNodesPass()(model)
    return found
