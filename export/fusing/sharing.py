"""Have each constant once and compute each result once: blocks are translated alone, and each brings its own."""

from __future__ import annotations

from collections.abc import Set

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass

from ppcl_fx.export.fusing.values import SMALL


def share_constants(model: ir.Model, weights: Set[str]) -> int:
    """Let equal small constants be one initializer; return how many went.

    Equal means the same type, shape and bytes. Weights are left alone: engines are refitted by their names.

    Args:
        model: the model, changed in place.
        weights: names of the initializers that are weights.
    """
    first: dict[tuple[object, ...], ir.Value] = {}
    gone = 0
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if name in weights or tensor is None or tensor.size > SMALL or value.is_graph_output():
            continue
        key = (tensor.dtype, tuple(tensor.shape), tensor.tobytes())
        kept = first.setdefault(key, value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            del model.graph.initializers[name]
            gone += 1
    return gone


def share_results(model: ir.Model) -> int:
    """Compute once what several nodes compute from the same values; return how many nodes went.

    The activation of the timestep embedding in front of each block's modulation is such a result, and so are the parts
    of a position table. The same operator on the same values gives the same bits, so this is exact.
    """
    before = len(model.graph)
    CommonSubexpressionEliminationPass()(model)
    return before - len(model.graph)
