"""Weights in few bits in an ONNX graph: ``DequantizeLinear`` in front of a product, and FP8 inputs around it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype

from ppcl_fx.export.fusing.values import made_by
from ppcl_fx.export.store.weight_source import WeightPiece, WeightSource, rows_in, scales_name, values_name
from ppcl_fx.export.store.weight_store import Store
from ppcl_fx.passes.quantisation.schemes import QuantisedWeight, Scheme, Weights

KINDS: dict[Weights, ir.DataType] = {
    "int8": ir.DataType.INT8, "int4": ir.DataType.INT4, "fp8": ir.DataType.FLOAT8E4M3FN,
}  # fmt: skip
"""ONNX's types of stored values."""
SCHEMES = {kind: name for name, kind in KINDS.items()}
"""What a stored value's type says of its scheme."""


@dataclass(frozen=True)
class PackedRows:
    """What holds some rows of a weight in few bits.

    Attributes:
        values: ``[rows, columns]``.
        scales: ``[rows, columns / block]``, or ``[rows]`` without blocks.
        scheme: how they are stored.
        inputs: the scale of the layer's inputs, where those are stored as the weights are.
    """

    values: ir.TensorProtocol
    scales: ir.TensorProtocol
    scheme: Scheme
    inputs: float | None

    @property
    def attributes(self) -> dict[str, int]:
        """The attributes of its ``DequantizeLinear``: blocks lie along the columns, else each row has a scale."""
        return {"axis": 0} if self.scheme.block is None else {"axis": 1, "block_size": self.scheme.block}


def packed_rows(source: WeightSource, pieces: Sequence[WeightPiece], store: Store | None) -> list[PackedRows] | None:
    """Return what holds the pieces of a weight, in a store or in memory; None where the weight stays as it is."""
    if source.quantised is None or not source.in_few_bits(pieces):
        return None
    if store is None:
        return [_held(weight) for weight in source.quantised_pieces(pieces) or []]
    scheme, inputs = source.quantised.scheme, source.quantised.inputs
    return [_placed(piece, scheme, inputs.get(piece.name), store) for piece in pieces]


def _held(weight: QuantisedWeight) -> PackedRows:
    scheme = weight.scheme
    scales = weight.scales.to(scheme.scale).contiguous()
    packed = weight.packed().contiguous()
    values: ir.TensorProtocol
    if scheme.weights == "int4":
        values = ir.PackedTensor(packed.numpy(), KINDS["int4"], shape=ir.Shape(weight.values.shape))
    else:
        values = TorchTensor(packed)
    return PackedRows(values, TorchTensor(scales if scheme.block else scales[:, 0]), scheme, weight.inputs)


def _placed(piece: WeightPiece, scheme: Scheme, inputs: float | None, store: Store) -> PackedRows:
    def part(name: str, kind: ir.DataType, shape: Sequence[int]) -> ir.ExternalTensor:
        file, offset, length = store.place_of_rows(name, *rows_in(piece))
        return ir.ExternalTensor(
            file, offset, length, kind, shape=ir.Shape(shape), name=name, base_dir=store.folder
        )

    rows, columns = piece.shape
    blocks = () if scheme.block is None else (columns // scheme.block,)
    values = part(values_name(piece.name), KINDS[scheme.weights], piece.shape)
    return PackedRows(
        values, part(scales_name(piece.name), from_torch_dtype(scheme.scale), (rows, *blocks)), scheme, inputs
    )


def products(weight: ir.Value) -> Iterator[ir.Node]:
    """Give the products of inputs and a weight as PyTorch stores it, ``[rows, columns]``."""
    for user, _ in weight.uses():
        if user.op_type == "Transpose":
            yield from (node for node, index in user.outputs[0].uses() if node.op_type == "MatMul" and index == 1)
        elif user.op_type == "Gemm":
            yield user


def store_inputs(graph: ir.Graph, scales: Mapping[ir.Value, ir.Value]) -> int:
    """Store the inputs of products as FP8, each with the scale of its weight; return how many inputs there are.

    Args:
        graph: the graph, changed in place.
        scales: dequantised weight -> the scale of what it is multiplied with, a constant.
    """
    stored: dict[tuple[ir.Value, ir.Value], ir.Value] = {}
    for weight, scale in scales.items():
        found = list(products(weight))
        if not found:
            raise RuntimeError(f"{weight.name}: no product takes this weight")
        for node in found:
            value = node.inputs[0]
            assert value is not None
            if (value, scale) not in stored:
                name = f"{value.name}/fp8_{len(stored)}"
                kind = int(KINDS["fp8"])
                few = ir.node("QuantizeLinear", [value, scale], {"output_dtype": kind}, name=f"{name}/stored")
                few.outputs[0].name = few.name
                again = ir.node("DequantizeLinear", [few.outputs[0], scale], name=name)
                again.outputs[0].name = name
                producer = value.producer()
                if producer is not None:
                    graph.insert_after(producer, [few, again])
                else:
                    graph.insert_before(graph[0], [few, again])
                stored[value, scale] = again.outputs[0]
            node.replace_input_with(0, stored[value, scale])
    return len(stored)


def inputs_as_they_are(graph: ir.Graph) -> int:
    """Take out what `store_inputs` put in; return how many inputs it was."""
    again = [node for node in graph if node.op_type == "DequantizeLinear" and made_by(node.inputs[0], "QuantizeLinear")]
    for node in again:
        few = made_by(node.inputs[0], "QuantizeLinear")
        assert few is not None and few.inputs[0] is not None
        node.outputs[0].replace_all_uses_with(few.inputs[0])
        graph.remove([node, few], safe=True)
    return len(again)


def input_scale(weight: ir.Value) -> float | None:
    """Return the scale that `store_inputs` gave the inputs of a dequantised weight; None where it gave none."""
    for node in products(weight):
        again = made_by(node.inputs[0], "DequantizeLinear")
        few = made_by(again.inputs[0], "QuantizeLinear") if again is not None else None
        scale = few.inputs[1] if few is not None else None
        if scale is not None and scale.const_value is not None:
            return float(torch.from_numpy(scale.const_value.numpy().astype("float32")))
    return None
