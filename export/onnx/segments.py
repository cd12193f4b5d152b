"""Cut a graph into segments, one for each run of nodes of one block, so that look-alike blocks are translated once."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ppcl_fx.export.store.weight_source import state
from ppcl_fx.ir.graphs import attribute
from ppcl_fx.ir.liveness import owner
from ppcl_fx.ir.partition import grouped, parts
from ppcl_fx.passes.lowering.tuples_apart import holds_tensors

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class GraphSegment:
    """A part of a graph that takes tensors and returns tensors.

    Attributes:
        name: the path of its block, or ``between`` and a number for what lies outside of blocks.
        graph: its graph module, with the modules of the whole at their own paths; returns a tuple.
        inputs: the nodes of the whole graph it takes, in order.
        outputs: the nodes of the whole graph it returns, in order.
        parameters: the parameters and buffers it uses, by path, in an order that look-alike segments share.
    """

    name: str
    graph: GraphModule = field(repr=False)
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    parameters: tuple[str, ...]


@dataclass
class Translations:
    """Segments translated so far, by structure: look-alike blocks, of other students too, are translated once."""

    graphs: dict[str, ir.Graph] = field(default_factory=dict)
    made: int = 0
    reused: int = 0


def segments(gm: GraphModule) -> list[GraphSegment]:
    """Cut a lowered graph, in which no tuple of tensors travels between nodes, in the order of computation.

    What is no tensor (sizes, types) does not cross a cut: each segment computes it again from the tensors.
    """
    own = [n for n in gm.graph.nodes if n.op not in ("placeholder", "output", "get_attr") and _crosses(n)]
    home = parts(own, between=True)
    made = [
        _Part(gm, index, owner(nodes[0]) or f"between_{index}", nodes, home)
        for index, nodes in enumerate(grouped(home))
    ]
    wanted = {node for part in made for node in part.inputs} | set(gm.graph.output_node().all_input_nodes)
    return [part.finish([node for node in part.nodes if node in wanted]) for part in made]


def _crosses(node: Node) -> bool:
    """Tell whether a node has a segment of its own: tensors do, and what works in place; sizes do not."""
    value = node.meta.get("val")
    return value is None or isinstance(value, torch.Tensor) or holds_tensors(value)


class _Part:
    """A segment in the making. It is no `carve`: what is no tensor is computed again instead of crossing the cut."""

    def __init__(self, gm: GraphModule, index: int, name: str, nodes: list[Node], home: dict[Node, int]) -> None:
        self.gm, self.index, self.name, self.nodes, self.home = gm, index, name, nodes, home
        self.graph = Graph()
        self.copies: dict[Node, Node] = {}
        self.inputs: list[Node] = []
        for node in nodes:
            self._copy(node)

    def _copy(self, node: Node) -> Node:
        if node in self.copies:
            return self.copies[node]
        if node.op == "placeholder" or self.home.get(node, self.index) != self.index:
            with self.graph.inserting_after(self.copies[self.inputs[-1]] if self.inputs else None):
                new = self.graph.placeholder(f"in{len(self.inputs)}")
            new.meta = dict(node.meta)
            self.inputs.append(node)
        else:
            for source in node.all_input_nodes:
                self._copy(source)
            new = self.graph.node_copy(node, self.copies.__getitem__)
        self.copies[node] = new
        return new

    def finish(self, outputs: list[Node]) -> GraphSegment:
        self.graph.output(tuple(self.copies[node] for node in outputs))
        graph = GraphModule(self.gm, self.graph, class_name="Segment")
        return GraphSegment(self.name, graph, tuple(self.inputs), tuple(outputs), tuple(state(graph)))


def structure(segment: GraphSegment, inputs: list[str]) -> str:
    """Return a hash that two segments share exactly when one translation serves both, weights aside.

    Each of `inputs` describes an input: type, sizes, which sizes change.
    """
    numbers: dict[Node, tuple[str, int]] = {}
    order = {name: i for i, name in enumerate(segment.parameters)}
    lines = [*inputs]
    for node in segment.graph.graph.nodes:
        numbers[node] = ("node", len(numbers))
        what = str(node.target) if node.op in ("call_function", "call_method") else ""
        if node.op == "call_function":
            what = f"{getattr(node.target, '__module__', '')}.{what.partition(' at 0x')[0]} {_value(node.target)}"
        elif node.op == "get_attr":
            tensor = attribute(segment.graph, str(node.target))
            what = f"parameter {order[str(node.target)]} {_tensor(tensor)}"
        elif node.op == "call_module":
            what = described(segment.graph.get_submodule(str(node.target)), f"{node.target}.", order)
        lines.append(f"{node.op} {what} {map_arg((node.args, node.kwargs), numbers.__getitem__)!r}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _tensor(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else repr(value)


def described(module: nn.Module, path: str = "", order: Mapping[str, int] | None = None) -> str:
    """Describe a module by everything its computation can depend on, the values of its parameters aside.

    Args:
        module: the module.
        path: what stands before the names of its parameters in `order`.
        order: a number for each parameter, where it is to be told which is which.
    """
    lines: list[str] = []
    for name, child in module.named_modules():
        lines.append(f"{name}: {type(child).__module__}.{type(child).__qualname__} training={child.training}")
        lines += _attributes(child, depth=0)
    numbers = order or {}
    lines += [f"{numbers.get(path + name)}: {name} {_tensor(tensor)}" for name, tensor in state(module).items()]
    return "; ".join(lines)


_INTERNAL = set(vars(nn.Module()))


def _attributes(thing: Any, depth: int) -> Iterator[str]:
    for name, value in sorted(vars(thing).items()):
        if not (isinstance(thing, nn.Module) and name in _INTERNAL):
            yield f"{name}={_value(value, depth)}"


def _value(value: Any, depth: int = 0) -> str:
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, torch.Size)):
        return repr(value)
    if isinstance(value, torch.Tensor):  # a constant on a plain attribute: its values count
        data = value.detach().cpu().contiguous().resolve_conj()
        real = torch.view_as_real(data) if data.is_complex() else data
        return f"{_tensor(data)} {hashlib.sha256(real.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(item, depth) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {_value(item, depth)}' for key, item in value.items())}}}"
    if isinstance(value, nn.Module):
        return type(value).__qualname__
    if isinstance(value, functools.partial):
        return f"partial({', '.join(_value(part, depth) for part in (value.func, value.args, value.keywords))})"
    if callable(value) and hasattr(value, "__qualname__"):
        name = f"{value.__module__}.{value.__qualname__}"
        own = getattr(value, "__func__", value)  # of a bound method, which is another object at each look
        # Two functions made in one place have one name, and may differ by what they enclose.
        return f"{name} {id(own)}" if getattr(own, "__closure__", None) or "<" in value.__qualname__ else name
    if depth < 3 and hasattr(value, "__dict__"):  # an attention processor
        return f"{type(value).__qualname__}({', '.join(_attributes(value, depth + 1))})"
    return f"{type(value).__qualname__} {id(value)}"  # unknown: alike only to itself
