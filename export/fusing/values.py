"""Read an ONNX graph backwards: what made a value, which constant it is, which sizes a shape consists of."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

SMALL = 64
"""Elements of the largest tensor that is looked into; anything larger is a weight."""

Size = int | ir.Value
"""A size in a shape: a number, or the value of one element that holds it."""


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Return the node that makes a value if it is of a type of the ONNX domain, else None."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.domain == "" and node.op_type == op_type else None


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


def _one_element(value: ir.Value) -> bool:
    """Tell whether a value is known to be a vector of one element."""
    shape = made_by(value, "Shape")
    if shape is not None:
        start, end = attribute(shape, "start", 0), attribute(shape, "end", -1)
        return start >= 0 and end - start == 1
    for op_type in ("Reshape", "Unsqueeze"):
        node = made_by(value, op_type)
        if node is not None:
            return ints(node.inputs[1]) in ((-1,), (0,), (1,)) and _scalar(node.inputs[0])
    return False


def _scalar(value: ir.Value | None) -> bool:
    """Tell whether a value is known to have no dimension."""
    found = constant(value)
    if found is not None:
        return found.ndim == 0
    squeezed = made_by(value, "Squeeze")
    if squeezed is not None:
        return squeezed.inputs[0] is not None and _one_element(squeezed.inputs[0])
    for op_type in ("Add", "Sub", "Mul", "Div"):
        node = made_by(value, op_type)
        if node is not None:
            return all(_scalar(item) for item in node.inputs)
    return False
