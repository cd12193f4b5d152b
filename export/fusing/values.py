"""Read an ONNX graph backwards: what made a value, which constant it is, which sizes a shape consists of."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

SMALL = 64
"""Elements of the largest tensor that is looked into; anything larger is a weight."""

Size = int | ir.Value
"""A size in a shape: a number, or the value of one element that holds it."""

_ELEMENTWISE = ("Cast", "Identity", "Cos", "Sin", "Neg")


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """Return the node that makes a value if it is of one of these types of the ONNX domain, else None."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.domain == "" and node.op_type in op_types else None


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Return what a value holds if it is a small constant, an initializer or the result of ``Constant``."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return tensor.numpy() if tensor is not None and tensor.size <= SMALL else None


def ints(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return the whole numbers of a constant, a single one too, or None."""
    found = constant(value)
    if found is None or found.dtype.kind != "i":
        return None
    return tuple(int(item) for item in found.reshape(-1))


def attribute(node: ir.Node, name: str, default: int) -> int:
    """Return a whole-numbered attribute of a node."""
    return int(node.attributes[name].value) if name in node.attributes else default


def sizes(shape: ir.Value | None) -> list[Size] | None:
    """Return the sizes that a shape consists of, or None where their number is not known."""
    known = ints(shape)
    if known is not None:
        return list(known)
    joined = made_by(shape, "Concat")
    if joined is None:
        return None
    found: list[Size] = []
    for piece in joined.inputs:
        numbers = ints(piece)
        if numbers is not None:
            found += numbers
        elif piece is not None and _one_element(piece):
            found.append(piece)
        else:
            return None
    return found


def _one_element(value: ir.Value | None) -> bool:
    """Tell whether a value is known to be a vector of one element."""
    shape, deeper = made_by(value, "Shape"), made_by(value, "Reshape", "Unsqueeze")
    if shape is not None:
        start, end = attribute(shape, "start", 0), attribute(shape, "end", -1)
        return start >= 0 and end - start == 1
    return deeper is not None and ints(deeper.inputs[1]) in ((-1,), (0,), (1,)) and _scalar(deeper.inputs[0])


def _scalar(value: ir.Value | None) -> bool:
    """Tell whether a value is known to have no dimension."""
    found, squeezed, computed = constant(value), made_by(value, "Squeeze"), made_by(value, "Add", "Sub", "Mul", "Div")
    if found is not None:
        return found.ndim == 0
    if squeezed is not None:
        return _one_element(squeezed.inputs[0])
    return computed is not None and all(_scalar(item) for item in computed.inputs)


def paired(table: ir.Value | None) -> int | None:
    """Return the rank of a table whose last dimension holds each number twice in a row, None where that is not known.

    What is understood: ``repeat_interleave(2)`` (a new last dimension, stretched to two, and folded in), a constant of
    such numbers, and tables made of such tables by joining along the last dimension or by an elementwise function.
    """
    joined, changed = made_by(table, "Concat"), made_by(table, *_ELEMENTWISE)
    if joined is not None:
        ranks = {paired(piece) for piece in joined.inputs}
        rank = ranks.pop() if len(ranks) == 1 else None
        return rank if rank is not None and attribute(joined, "axis", 0) in (-1, rank - 1) else None
    if changed is not None:
        return paired(changed.inputs[0])
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
