"""Whether the sizes of a profile fit each other, asked of the ONNX file before a compiler sees them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppcl_fx.errors import PpclError
from ppcl_fx.export.extras import need
from ppcl_fx.export.tensorrt.profiles import KINDS, Profile

TABLES = {"RotaryEmbedding": ((0, 1, -2), (0, 2, -2)), "Attention": ((0, 3, -2), (1, 3, -1), (1, 2, -2))}
"""What ONNX's inference does not compare: of an operator two inputs, the first by its next to last size, which is the
tokens, and which size of the second has to be the same, or one: tables of positions, and the mask.
"""


def check_agreement(onnx: Path, profiles: Sequence[Profile]) -> None:
    """Raise `PpclError` where sizes of a profile contradict each other: the batch of two inputs, tokens and the
    table of their positions, a text and its mask.

    An exported graph calls sizes that must be equal by one name. What names leave open is found by inferring the shapes
    of the whole graph at each profile's smallest, best and largest sizes; no weight is read.
    """
    library = need("onnx")
    model = library.load(str(onnx), load_external_data=False)
    dims = [dim for port in model.graph.input for dim in port.type.tensor_type.shape.dim if dim.dim_param]
    names = [str(dim.dim_param) for dim in dims]
    for profile in profiles:
        for kind in KINDS:
            for dim, name in zip(dims, names, strict=True):
                if name in profile.sizes:
                    dim.dim_value = getattr(profile.sizes[name], kind)
            reason = _contradiction(library, model)
            if reason is not None:
                given = ", ".join(f"{name} {getattr(size, kind)}" for name, size in profile.sizes.items())
                raise PpclError(
                    f"{onnx}: sizes of the profile {profile.name or 'asked for'} contradict each other: {given} "
                    f"({reason}); give sizes that agree"
                )


def _contradiction(library: Any, model: Any) -> str | None:
    """Return the first node of a graph with certain inputs whose own inputs do not fit each other, and why."""
    try:
        graph = library.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    except library.shape_inference.InferenceError as error:
        text = str(error)
        found = re.search(r"\(op_type:\s*(\w+),? node name:\s*([^)]*)\):\s*([^(]*)", text)
        words = " ".join((found[3] if found else text).split()).removeprefix("[ShapeInferenceError] ")[:200]
        return f"{found[1]} {found[2].strip()}: {words}" if found else words
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]  # 0 where unknown
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    for node in graph.node:
        for first, second, axis in TABLES.get(node.op_type, ()):
            names = [node.input[index] if index < len(node.input) else "" for index in (first, second)]
            one, other = (shapes.get(name, []) for name in names)
            if len(one) < 2 or len(other) < 2 or other[axis] in (0, 1, one[-2]) or not one[-2]:
                continue
            return f"{node.op_type} {node.name}: {one[-2]} tokens, and {other[axis]} in {names[1]}"
    return None
