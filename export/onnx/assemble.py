"""Put the translated segments of a graph together into one ONNX model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from torch import nn
from torch.fx import GraphModule, Node

from ppcl_fx.export.fusing.values import SMALL
from ppcl_fx.export.onnx.attention import AttentionForm, plain_masks
from ppcl_fx.export.onnx.graph_run import Seen
from ppcl_fx.export.onnx.quantised import PackedRows, packed_rows, store_inputs
from ppcl_fx.export.onnx.segments import GraphSegment, Translations, segments, structure
from ppcl_fx.export.onnx.translate import OPSET, translate
from ppcl_fx.export.store.weight_source import WeightPiece, WeightSource, scales_name, state
from ppcl_fx.export.store.weight_store import Store

IR_VERSION = 11

Initial = Callable[[str, torch.Tensor], Sequence[ir.TensorProtocol | PackedRows]]
"""Gives what holds a parameter's values: one tensor, or several that are put one behind the other; or its rows in few
bits."""

ROWS = "/rows"
"""What follows a parameter's name where it is put together."""


def held(name: str, tensor: torch.Tensor) -> list[ir.TensorProtocol]:
    """Return a tensor's own values."""
    return [TorchTensor(tensor.detach().contiguous(), name=name)]


def initializers(
    source: WeightSource, pieces: Mapping[str, Sequence[WeightPiece]], store: Store | None
) -> Initial:
    """Let initializers point to where a store has the pieces of each parameter; without a store they are read, one at
    a time, when the graph is written. Small tables that no file holds are in the graph.
    """

    def read(piece: WeightPiece, dtype: torch.dtype) -> TorchTensor:
        flat = source.read(piece.name).reshape(-1)
        part = flat[piece.first : piece.first + torch.Size(piece.shape).numel()]
        return TorchTensor(part.reshape(piece.shape).to(dtype))

    def placed(store: Store, name: str, piece: WeightPiece, wanted: torch.dtype) -> ir.ExternalTensor:
        file, offset, dtype = store.place(piece)
        assert dtype == wanted, (name, dtype, wanted)
        length, shape = torch.Size(piece.shape).numel() * dtype.itemsize, ir.Shape(piece.shape)
        kind = from_torch_dtype(dtype)
        return ir.ExternalTensor(file, offset, length, kind, shape=shape, name=name, base_dir=store.folder)

    def initial(name: str, tensor: torch.Tensor) -> Sequence[ir.TensorProtocol | PackedRows]:
        if name not in pieces:
            if tensor.is_meta:
                raise RuntimeError(f"{name}: on the meta device, and no file is known that holds it")
            return held(name, tensor)
        few = packed_rows(source, pieces[name], store)
        if few is not None:
            return few
        if store is not None:
            return [placed(store, name, piece, tensor.dtype) for piece in pieces[name]]
        kind = from_torch_dtype(tensor.dtype)
        return [
            ir.LazyTensor(partial(read, piece, tensor.dtype), dtype=kind, shape=ir.Shape(piece.shape), name=name)
            for piece in pieces[name]
        ]

    return initial


def weight_files(model: ir.Model) -> list[str]:
    """Return the files that a model's initializers point to, in order of their names."""
    held_outside = (v.const_value for v in model.graph.initializers.values())
    return sorted({str(tensor.location) for tensor in held_outside if isinstance(tensor, ir.ExternalTensor)})


@dataclass(frozen=True)
class Shapes:
    """What was seen of every tensor of a graph in its example, and with each axis, by name, changed alone."""

    base: dict[Node, Seen]
    others: dict[str, dict[Node, Seen]]

    def axes(self, node: Node) -> list[list[str]]:
        """Return for each dimension of a node the axes it changes with."""
        sizes = self.base[node][0]
        return [[n for n, seen in self.others.items() if seen[node][0][d] != size] for d, size in enumerate(sizes)]

    def changing(self, node: Node) -> tuple[int, ...]:
        """Return the dimensions of a node whose size changes."""
        return tuple(dim for dim, names in enumerate(self.axes(node)) if names)

    def open_shape(self, node: Node) -> ir.Shape:
        """Return the shape with the axes' names where it changes."""
        shape: list[int | str] = list(self.base[node][0])
        for dim, names in enumerate(self.axes(node)):
            if names:
                shape[dim] = names[0] if len(names) == 1 else f"{node.name}_{dim}"
        return ir.Shape(shape)

    def kind(self, node: Node) -> ir.TensorType:
        """Return the type."""
        return ir.TensorType(from_torch_dtype(self.base[node][1]))


def stitch(
    gm: GraphModule,
    shapes: Shapes,
    known: Translations,
    initial: Initial = held,
    attention: AttentionForm = "auto",
) -> ir.Model:
    """Translate a lowered graph into one ONNX model, segment by segment.

    Args:
        gm: a lowered graph.
        shapes: the shapes of its tensors.
        known: translations to use again; new ones are added.
        initial: gives what holds the values of each parameter.
        attention: how attention is written.
    """
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="transformer")
    values: dict[Node, ir.Value] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            values[node] = ir.Value(name=str(node.target), shape=shapes.open_shape(node), type=shapes.kind(node))
            graph.inputs.append(values[node])
    weights = Initializers(gm, graph, initial)
    for number, segment in enumerate(segments(gm)):
        _add(segment, number, graph, values, weights, _translated(segment, shapes, known, attention))
    store_inputs(graph, weights.input_scales)
    for index, node in enumerate(gm.graph.output_node().all_input_nodes):
        value = values[node]
        value.name = "sample" if index == 0 else f"sample_{index}"
        value.shape = shapes.open_shape(node)
        value.type = shapes.kind(node)
        graph.outputs.append(value)
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="ppcl-fx")


def _translated(
    segment: GraphSegment, shapes: Shapes, known: Translations, attention: AttentionForm
) -> ir.Graph:
    changing = [shapes.changing(n) for n in segment.inputs]
    seen = [shapes.base[n] for n in segment.inputs]
    described = [f"{dtype} {size} {dims}" for (size, dtype), dims in zip(seen, changing, strict=True)]
    key = structure(segment, [*described, attention])
    if key in known.graphs:
        known.reused += 1
        return known.graphs[key]
    # Values do not matter, and memory that nobody writes to costs nothing.
    graph = translate(segment, [torch.empty(size, dtype=dtype) for size, dtype in seen], changing, attention)
    plain_masks(graph)
    known.graphs[key] = graph
    known.made += 1
    return graph


def _add(
    segment: GraphSegment,
    number: int,
    graph: ir.Graph,
    values: dict[Node, ir.Value],
    weights: Initializers,
    translated: ir.Graph,
) -> None:
    """Copy a translated segment into the whole, with the segment's own weights."""
    part = translated.clone()
    split = len(segment.inputs)
    for value, source in zip(part.inputs[:split], segment.inputs, strict=True):
        value.replace_all_uses_with(values[source], replace_graph_outputs=True)
    for value, name in zip(part.inputs[split:], segment.parameters, strict=True):
        if value.uses():
            value.replace_all_uses_with(weights(name))
    for value in part.initializers.values():
        if value.uses():
            value.replace_all_uses_with(weights.constant(f"{segment.name}/{number}/{value.name}", value))
    outputs = list(part.outputs)
    part.outputs.clear()
    nodes = list(part)
    part.remove(nodes)
    for node in nodes:
        node.name = f"{segment.name}/{number}/{node.name}"
        node.metadata_props.clear()
        node.doc_string = None
        for result in node.outputs:
            result.name = f"{segment.name}/{number}/{result.name}"
            result.shape = None  # its names for open sizes mean nothing outside of the segment
            result.metadata_props.clear()
    graph.extend(nodes)
    for fx_node, value in zip(segment.outputs, outputs, strict=True):
        values[fx_node] = value


class Initializers:
    """The initializers of a model: each weight once, under the name of its parameter, and each small constant once."""

    def __init__(self, module: nn.Module, graph: ir.Graph, initial: Initial) -> None:
        self.graph, self.initial, self.state = graph, initial, state(module)
        self.seen: dict[tuple[int, torch.Size], ir.Value] = {}
        self.constants: dict[tuple[object, ...], ir.Value] = {}
        self.input_scales: dict[ir.Value, ir.Value] = {}

    def __call__(self, name: str) -> ir.Value:
        tensor = self.state[name]
        key = (id(tensor), tensor.shape)
        if key not in self.seen:
            found = self.initial(name, tensor)
            rows = [""] if len(found) == 1 else [f"{ROWS}{i}" for i in range(len(found))]
            parts = [self._part(name, row, one) for row, one in zip(rows, found, strict=True)]
            self.seen[key] = whole = parts[0] if len(parts) == 1 else self._joined(name, tensor, parts)
            scale = found[0].inputs if isinstance(found[0], PackedRows) else None
            if scale is not None:
                told = ir.tensor(torch.tensor(scale, dtype=tensor.dtype), name=f"{name}/inputs")
                value = ir.Value(name=told.name, const_value=told, shape=ir.Shape([]), type=ir.TensorType(told.dtype))
                self.input_scales[whole] = self.constant(f"{name}/inputs", value)
        return self.seen[key]

    def _part(self, name: str, row: str, found: ir.TensorProtocol | PackedRows) -> ir.Value:
        if not isinstance(found, PackedRows):
            return self._added(f"{name}{row}", found)
        stored = [self._added(f"{name}{row}", found.values), self._added(f"{scales_name(name)}{row}", found.scales)]
        shape = ir.Shape(tuple(found.values.shape.numpy()))
        value = ir.Value(name=f"{name}{row}/dequantised", shape=shape, type=stored[1].type)
        self.graph.append(ir.node("DequantizeLinear", stored, found.attributes, name=value.name, outputs=[value]))
        return value

    def _added(self, name: str, const: ir.TensorProtocol) -> ir.Value:
        const.name = name
        value = ir.Value(name=name, const_value=const, shape=const.shape, type=ir.TensorType(const.dtype))  # type: ignore[arg-type]
        self.graph.register_initializer(value)
        return value

    def _joined(self, name: str, tensor: torch.Tensor, parts: list[ir.Value]) -> ir.Value:
        """Put rows of one weight together: runtimes do that once, when they load the file."""
        kind = ir.TensorType(from_torch_dtype(tensor.dtype))
        whole = ir.Value(name=f"{name}{ROWS}", shape=ir.Shape(tensor.shape), type=kind)
        self.graph.append(ir.node("Concat", parts, {"axis": 0}, name=whole.name, outputs=[whole]))
        return whole

    def constant(self, name: str, value: ir.Value) -> ir.Value:
        """Return a constant that no parameter holds; small ones of the same type, shape and bytes are one."""
        tensor = value.const_value
        assert tensor is not None
        small = tensor.size <= SMALL
        key = (tensor.dtype, tuple(tensor.shape), tensor.tobytes()) if small else (name,)
        if key not in self.constants:
            self.constants[key] = ir.Value(name=name, const_value=tensor, shape=value.shape, type=value.type)
            self.graph.register_initializer(self.constants[key])
        return self.constants[key]
