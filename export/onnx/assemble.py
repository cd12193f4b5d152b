"""Put the translated segments of a graph together into one ONNX model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch.fx import GraphModule, Node

from ppcl_fx.export.onnx.graph_run import Seen
from ppcl_fx.export.onnx.segments import GraphSegment, segments, structure
from ppcl_fx.export.onnx.translate import OPSET, translate

IR_VERSION = 11

Initial = Callable[[str, torch.Tensor], Sequence[ir.TensorProtocol]]
"""Gives what holds a parameter's values: one tensor, or several that are put one behind the other."""

ROWS = "/rows"
"""What follows a parameter's name where it is put together."""


def held(name: str, tensor: torch.Tensor) -> list[ir.TensorProtocol]:
    """Return a tensor's own values."""
    return [TorchTensor(tensor.detach().contiguous(), name=name)]


@dataclass
class Translations:
    """Segments translated so far, by structure: look-alike blocks, of other students too, are translated once."""

    graphs: dict[str, ir.Graph] = field(default_factory=dict)
    made: int = 0
    reused: int = 0


@dataclass(frozen=True)
class Shapes:
    """Shape and type of every tensor of a graph for its example, and which sizes change with which axis.

    Attributes:
        sizes: the shape in the example.
        types: the type in the example.
        axes: for each dimension the names of the axes it changes with.
    """

    sizes: dict[Node, tuple[int, ...]]
    types: dict[Node, torch.dtype]
    axes: dict[Node, tuple[tuple[str, ...], ...]]

    def changing(self, node: Node) -> tuple[int, ...]:
        """Return the dimensions of a node whose size changes."""
        return tuple(dim for dim, names in enumerate(self.axes[node]) if names)

    def open_shape(self, node: Node) -> ir.Shape:
        """Return the shape with the axes' names where it changes."""
        return ir.Shape(
            [_dim(node, dim, names, size) for dim, (size, names) in enumerate(
                zip(self.sizes[node], self.axes[node], strict=True)
            )]
        )


def _dim(node: Node, dim: int, names: tuple[str, ...], size: int) -> int | str:
    if not names:
        return size
    return names[0] if len(names) == 1 else f"{node.name}_{dim}"


def observed(base: dict[Node, Seen], others: dict[str, dict[Node, Seen]]) -> Shapes:
    """Compare the shapes seen with each axis changed alone to those of the example."""
    axes = {
        node: tuple(
            tuple(name for name, seen in others.items() if seen[node][0][dim] != size) for dim, size in enumerate(shape)
        )
        for node, (shape, _) in base.items()
    }
    return Shapes({n: s for n, (s, _) in base.items()}, {n: t for n, (_, t) in base.items()}, axes)


def stitch(
    gm: GraphModule, shapes: Shapes, known: Translations, output_name: str = "sample", initial: Initial = held
) -> ir.Model:
    """Translate a lowered graph into one ONNX model, segment by segment.

    Args:
        gm: a lowered graph.
        shapes: the shapes of its tensors.
        known: translations to use again; new ones are added.
        output_name: the name of the first output.
        initial: gives what holds the values of each parameter.

    Raises:
        PpclError: a segment cannot be translated.
    """
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="transformer")
    values: dict[Node, ir.Value] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            values[node] = _value(str(node.target), shapes.types[node], shapes.open_shape(node))
            graph.inputs.append(values[node])
    weights = _Weights(gm, graph, initial)
    for number, segment in enumerate(segments(gm)):
        _add(segment, number, graph, values, weights, _translated(segment, shapes, known))
    for index, node in enumerate(gm.graph.output_node().all_input_nodes):
        value = values[node]
        value.name = output_name if index == 0 else f"{output_name}_{index}"
        value.shape = shapes.open_shape(node)
        value.dtype = _dtype(shapes.types[node])
        graph.outputs.append(value)
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="ppcl-fx")


def _translated(segment: GraphSegment, shapes: Shapes, known: Translations) -> ir.Graph:
    described = [f"{shapes.types[n]} {shapes.sizes[n]} {shapes.changing(n)}" for n in segment.inputs]
    key = structure(segment, described)
    if key in known.graphs:
        known.reused += 1
        return known.graphs[key]
    # Values do not matter, and memory that nobody writes to costs nothing.
    examples = [torch.empty(shapes.sizes[n], dtype=shapes.types[n]) for n in segment.inputs]
    graph = translate(segment, examples, [shapes.changing(n) for n in segment.inputs])
    widen_masks(graph)
    known.graphs[key] = graph
    known.made += 1
    return graph


def _add(
    segment: GraphSegment,
    number: int,
    graph: ir.Graph,
    values: dict[Node, ir.Value],
    weights: _Weights,
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


class _Weights:
    """The initializers of the model: each tensor once, under the name of its parameter."""

    def __init__(self, gm: GraphModule, graph: ir.Graph, initial: Initial) -> None:
        self.graph, self.initial = graph, initial
        self.state = {
            **dict(gm.named_parameters(remove_duplicate=False)),
            **dict(gm.named_buffers(remove_duplicate=False)),
        }
        self.seen: dict[tuple[int, torch.Size], ir.Value] = {}

    def __call__(self, name: str) -> ir.Value:
        tensor = self.state[name]
        key = (id(tensor), tensor.shape)
        if key not in self.seen:
            found = self.initial(name, tensor)
            single = len(found) == 1
            parts = [self._one(name if single else f"{name}{ROWS}{i}", one) for i, one in enumerate(found)]
            self.seen[key] = parts[0] if single else self._joined(name, tensor, parts)
        return self.seen[key]

    def _one(self, name: str, const: ir.TensorProtocol) -> ir.Value:
        const.name = name
        value = ir.Value(name=name, const_value=const, shape=const.shape, type=ir.TensorType(const.dtype))  # type: ignore[arg-type]
        self.graph.register_initializer(value)
        return value

    def _joined(self, name: str, tensor: torch.Tensor, parts: list[ir.Value]) -> ir.Value:
        """Put rows of one weight together: runtimes do that once, when they load the file."""
        node = ir.node("Concat", parts, {"axis": 0}, name=f"{name}{ROWS}")
        node.outputs[0].name = f"{name}{ROWS}"
        node.outputs[0].shape = ir.Shape(tensor.shape)
        node.outputs[0].type = ir.TensorType(_dtype(tensor.dtype))
        self.graph.append(node)
        return node.outputs[0]

    def constant(self, name: str, value: ir.Value) -> ir.Value:
        new = ir.Value(name=name, const_value=value.const_value, shape=value.shape, type=value.type)
        self.graph.register_initializer(new)
        return new


def _value(name: str, dtype: torch.dtype, shape: ir.Shape) -> ir.Value:
    return ir.Value(name=name, shape=shape, type=ir.TensorType(_dtype(dtype)))


def _dtype(dtype: torch.dtype) -> ir.DataType:
    return TorchTensor(torch.empty(0, dtype=dtype)).dtype


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
