"""Linear layers over the weights in few bits that an ONNX file has, for a graph that PyTorch runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ppcl_fx.errors import PpclError
from ppcl_fx.export.onnx.assemble import ROWS
from ppcl_fx.export.onnx.quantised import SCHEMES, input_scale
from ppcl_fx.export.store.weight_source import scales_name
from ppcl_fx.export.tensorrt.request import load_onnx
from ppcl_fx.passes.quantisation.linear import QuantisedLinear
from ppcl_fx.passes.quantisation.schemes import QuantisedWeight, Scheme

STORED: dict[str, torch.dtype] = {"int4": torch.uint8, "int8": torch.int8, "float8e4m3fn": torch.uint8}
"""What holds the bytes of weights in few bits, by ONNX's names of their types."""


def put_quantised(
    graph: GraphModule, file: Path, weights: dict[str, Tensor], place: Callable[[Tensor], Tensor]
) -> None:
    """Replace linear layers of a graph by those over a file's weights in few bits, and take these from `weights`.

    Args:
        graph: changed in place.
        file: the ONNX file.
        weights: the file's weights by name, rows put together; packed ones as bytes.
        place: puts a tensor where the graph runs.

    Raises:
        PpclError: a weight has no scales, or scales of another weight.
    """
    for node in load_onnx(file).graph:
        value = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        stored = value.const_value if value is not None else None
        name = str(value.name).partition(ROWS)[0] if value is not None else ""
        if stored is None or stored.dtype not in SCHEMES or name not in weights:
            continue  # an input that was stored, or the rows of a weight that is there already
        packed, scales = weights.pop(name), weights.pop(scales_name(name), None)
        if scales is None:
            raise PpclError(f"{file}: {name} is in few bits, and its scales are not there; export again")
        block = node.attributes["block_size"].value if "block_size" in node.attributes else None
        whole = node.outputs[0].uses()
        joined = next((user.outputs[0] for user, _ in whole if user.op_type == "Concat"), node.outputs[0])
        scheme, inputs = Scheme(SCHEMES[stored.dtype], block, scales.dtype), input_scale(joined)
        scales = scales if scales.ndim == 2 else scales[:, None]
        path, _, leaf = name.rpartition(".")
        layer = graph.get_submodule(path)
        try:
            if isinstance(layer, nn.Linear) and leaf == "weight":
                made = QuantisedLinear(scheme, place(packed), place(scales), layer.bias, inputs)
                graph.set_submodule(path, made.train(layer.training))
            else:
                weights[name] = QuantisedWeight.unpacked(scheme, packed, scales).dequantised(scales.dtype)
        except PpclError as error:
            raise PpclError(f"{file}: {name}: {error}") from error
