"""Attention in the translation: masks as engines take them, or the whole written in products and a softmax."""

from __future__ import annotations

import math
from typing import Any, Literal

import onnx_ir as ir
import torch

from ppcl_fx.errors import PpclError
from ppcl_fx.export.extras import need

AttentionForm = Literal["auto", "primitive"]
"""How attention is written: ``auto`` as ``Attention``, which engines fuse where they can, or `in_primitives`."""

_LOWEST = {
    ir.DataType.FLOAT: float(torch.finfo(torch.float32).min),
    ir.DataType.FLOAT16: float(torch.finfo(torch.float16).min),
    ir.DataType.BFLOAT16: float(torch.finfo(torch.bfloat16).min),
}


def in_primitives(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Translate ``scaled_dot_product_attention`` into two products and a softmax between them, for runtimes that know
    no ``Attention``.

    The softmax is taken in float32. A power of two of the scale goes to the queries, which changes no digit of them and
    keeps float16 products in range; the rest to the scores.

    Raises:
        PpclError: the attention has dropout, a causal mask or groups of heads.
    """
    if dropout_p or is_causal or enable_gqa:
        raise PpclError("attention with dropout, a causal mask or groups of heads is not written in primitives")
    op = need("onnxscript").opset23
    size = query.shape[-1]
    assert isinstance(size, int)  # a head's channels follow from the weights
    scale = 1 / math.sqrt(size) if scale is None else scale
    power = 2.0 ** math.floor(math.log2(scale))
    scores = op.MatMul(op.Mul(query, _number(op, power, query.dtype)), op.Transpose(key, perm=[0, 1, 3, 2]))
    scores = _cast(op, scores, query.dtype, ir.DataType.FLOAT)
    if scale != power:
        scores = op.Mul(scores, _number(op, scale / power, ir.DataType.FLOAT))
    if attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL:
        nothing = _number(op, _LOWEST[ir.DataType.FLOAT], ir.DataType.FLOAT)
        scores = op.Where(attn_mask, scores, nothing)
    elif attn_mask is not None:
        scores = op.Add(scores, _cast(op, attn_mask, attn_mask.dtype, ir.DataType.FLOAT))
    weights = _cast(op, op.Softmax(scores, axis=-1), ir.DataType.FLOAT, query.dtype)
    return op.MatMul(weights, value)


def _number(op: Any, number: float, dtype: ir.DataType) -> Any:
    return op.Constant(value=ir.serde.serialize_tensor(ir.tensor(number, dtype=dtype)))


def _cast(op: Any, value: Any, dtype: ir.DataType, wanted: ir.DataType) -> Any:
    return value if dtype == wanted else op.Cast(value, to=int(wanted))


def plain_masks(graph: ir.Graph) -> int:
    """Make the mask of every ``Attention`` one that is added to the scores, as long as its queries; return how many
    there were.

    A mask of truth values becomes one of zeros and the lowest numbers of the type: TensorRT for RTX makes kernels of
    its own to convert it in each attention. ``[batch, 1, 1, keys]`` becomes ``[batch, 1, queries, keys]``, which
    onnxruntime does not do; a mask of full size stays what it is.
    """
    found = [n for n in graph if n.op_type == "Attention" and len(n.inputs) > 3 and n.inputs[3] is not None]
    for number, node in enumerate(found):
        tape, mask, query = ir.tape.Tape(), node.inputs[3], node.inputs[0]
        assert mask is not None and query is not None
        if mask.dtype == ir.DataType.BOOL and query.dtype in _LOWEST:
            seen, hidden = (
                tape.op("Constant", [], {"value": ir.tensor(value, dtype=query.dtype)}, name=f"mask_{name}_{number}")
                for name, value in (("seen", 0.0), ("hidden", _LOWEST[query.dtype]))
            )
            mask = tape.op("Where", [mask, seen, hidden], name=f"mask_added_{number}")
            mask.dtype = query.dtype
        ones = tape.op("Constant", [], {"value_ints": [1, 1]}, name=f"mask_ones_{number}")
        one = tape.op("Constant", [], {"value_ints": [1]}, name=f"mask_one_{number}")
        # Queries are [batch, heads, tokens, channels] here: PyTorch's exporter never writes the 3-D form.
        count = tape.op("Shape", [query], {"start": 2, "end": 3}, name=f"mask_queries_{number}")
        shape = tape.op("Concat", [ones, count, one], {"axis": 0}, name=f"mask_shape_{number}")
        wide = tape.op("Expand", [mask, shape], name=f"mask_wide_{number}")
        if mask.dtype is not None:
            wide.dtype = mask.dtype
        for step in tape.nodes:
            step.outputs[0].name = f"{step.name}_out"
        graph.insert_before(node, tape.nodes)
        node.replace_input_with(3, wide)
    return len(found)
