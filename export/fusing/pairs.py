"""Prove that a position table holds each number twice in a row, so that half of it says everything."""

from __future__ import annotations

import onnx_ir as ir

from ppcl_fx.export.fusing.values import attribute, constant, ints, made_by, sizes

_ELEMENTWISE = ("Cast", "Identity", "Cos", "Sin", "Neg")


def paired(table: ir.Value | None) -> int | None:
    """Return the rank of a table whose last dimension holds each number twice in a row, None where that is not known.

    What is understood: ``repeat_interleave(2)`` (a new last dimension, stretched to two, and folded in), a constant of
    such numbers, and tables made of such tables by joining along the last dimension or by an elementwise function.
    """
    joined = made_by(table, "Concat")
    if joined is not None:
        ranks = {paired(piece) for piece in joined.inputs}
        rank = ranks.pop() if len(ranks) == 1 else None
        return rank if rank is not None and attribute(joined, "axis", 0) in (-1, rank - 1) else None
    for op_type in _ELEMENTWISE:
        node = made_by(table, op_type)
        if node is not None:
            return paired(node.inputs[0])
    known = constant(table)
    if known is not None and known.ndim and known.shape[-1] % 2 == 0:
        return known.ndim if bool((known[..., 0::2] == known[..., 1::2]).all()) else None
    return _repeated(made_by(table, "Reshape"))


def _repeated(folded: ir.Node | None) -> int | None:
    """``Reshape(Expand(Unsqueeze(x, -1), [.., 1, 2]), [.., 2 n])``: the rank of the result."""
    stretched = made_by(folded.inputs[0], "Expand") if folded is not None else None
    deeper = made_by(stretched.inputs[0], "Unsqueeze") if stretched is not None else None
    if folded is None or stretched is None or deeper is None:
        return None
    by, shape, axes = sizes(stretched.inputs[1]), sizes(folded.inputs[1]), ints(deeper.inputs[1])
    if not by or not shape or axes not in ((-1,), (len(by) - 1,)):
        return None
    last = shape[-1]
    # An even last size keeps pairs together: the elements lie two by two, whatever the other sizes are.
    whole_pairs = isinstance(last, int) and last > 0 and last % 2 == 0
    return len(shape) if by[-1] == 2 and whole_pairs else None
