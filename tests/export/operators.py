"""Count the operators of an exported model."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

FUSED = ("Attention", "RMSNormalization", "RotaryEmbedding")
"""Operators of opset 23 that stand for a whole pattern each; engines have one kernel for each of them."""


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
