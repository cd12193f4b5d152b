"""Whether the sizes of a profile fit each other, asked of the ONNX file before a compiler sees them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ppcl_fx.errors import PpclError
from ppcl_fx.export.extras import need
from ppcl_fx.export.tensorrt.profiles import KINDS, Profile


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
            try:
                library.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
            except library.shape_inference.InferenceError as error:
                given = ", ".join(f"{name} {getattr(size, kind)}" for name, size in profile.sizes.items())
                raise PpclError(
                    f"{onnx}: sizes of the profile {profile.name or 'asked for'} contradict each other: {given} "
                    f"({_reason(str(error))}); give sizes that agree"
                ) from None


def _reason(text: str) -> str:
    """Return what ONNX says of the first node that does not fit, without its own framing."""
    found = re.search(r"\(op_type:\s*(\w+),? node name:\s*([^)]*)\):\s*(.*)", text, flags=re.DOTALL)
    words = " ".join((found[3] if found else text).split())[:200]
    return f"{found[1]} {found[2].strip()}: {words}" if found else words
