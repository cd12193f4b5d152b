"""Give attention masks their full size: onnxruntime does not stretch a mask over the queries, as ONNX allows."""

from __future__ import annotations

import onnx_ir as ir


def widen_masks(graph: ir.Graph) -> int:
    """Stretch the mask of every ``Attention`` over its queries; return how many there were.

    ``[batch, 1, 1, keys]`` becomes ``[batch, 1, queries, keys]``; a mask of full size stays what it is.
    """
    found = [n for n in graph if n.op_type == "Attention" and len(n.inputs) > 3 and n.inputs[3] is not None]
    for number, node in enumerate(found):
        query, mask = node.inputs[0], node.inputs[3]
        assert query is not None and mask is not None
        ones = ir.node("Constant", [], {"value_ints": [1, 1]}, name=f"mask_ones_{number}")
        one = ir.node("Constant", [], {"value_ints": [1]}, name=f"mask_one_{number}")
        # Queries are [batch, heads, tokens, channels] here: PyTorch's exporter never writes the 3-D form.
        count = ir.node("Shape", [query], {"start": 2, "end": 3}, name=f"mask_queries_{number}")
        shape = ir.node(
            "Concat", [ones.outputs[0], count.outputs[0], one.outputs[0]], {"axis": 0}, name=f"mask_shape_{number}"
        )
        wide = ir.node("Expand", [mask, shape.outputs[0]], name=f"mask_wide_{number}")
        for step in (ones, one, count, shape, wide):
            step.outputs[0].name = f"{step.name}_out"
        graph.insert_before(node, [ones, one, count, shape, wide])
        node.replace_input_with(3, wide.outputs[0])
    return len(found)
