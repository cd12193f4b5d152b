"""Make an ONNX graph one that engines fuse: shared constants and results, and the rotary embedding as one operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ppcl_fx.export.fusing.rotary import Unfused, fuse_rotary
from ppcl_fx.export.fusing.sharing import share_constants, share_results

FUSED = ("Attention", "RMSNormalization", "RotaryEmbedding")
"""Operators of opset 23 that stand for a whole pattern each; engines have one kernel for each of them."""


@dataclass(frozen=True)
class Fusion:
    """What `fuse` did to a graph.

    Attributes:
        constants: constants that were there more than once, and are shared now.
        results: nodes that computed what another node had computed, and are gone.
        rotary: rotations that became a ``RotaryEmbedding``.
        unfused: rotations that stay as they were, with the reason.
    """

    constants: int
    results: int
    rotary: int
    unfused: tuple[Unfused, ...]


def fuse(model: ir.Model, weights: Set[str]) -> Fusion:
    """Rewrite a stitched model in place.

    ``Attention`` and ``RMSNormalization`` are there already: PyTorch's translation writes them. Sharing is exact; a
    ``RotaryEmbedding`` does the same products and sums in the same type as what it stands for.

    Args:
        model: the whole model, blocks and what lies between them.
        weights: names of the initializers that are parameters or buffers: each stays one, also beside an equal one.
    """
    constants = share_constants(model, weights)
    results = share_results(model)
    rotary, unfused = fuse_rotary(model)
    results += share_results(model) if rotary else 0
    RemoveUnusedNodesPass()(model)
    return Fusion(constants, results, rotary, unfused)


def operators(model: ir.Model) -> dict[str, Counter[str]]:
    """Count the operators of a stitched model, for each segment by name (``transformer_blocks.0``)."""
    found: dict[str, Counter[str]] = {}
    for node in model.graph:
        found.setdefault((node.name or "").partition("/")[0], Counter())[node.op_type] += 1
    return found


def fused_operators(model: ir.Model) -> dict[str, int]:
    """Count the operators of `FUSED` in a model."""
    counts = Counter(node.op_type for node in model.graph)
    return {name: counts[name] for name in FUSED}
