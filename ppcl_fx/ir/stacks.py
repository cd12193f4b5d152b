"""Stacks: maximal runs of consecutive blocks whose graphs are isomorphic, found in the graph."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch.fx import GraphModule, Node

from ppcl_fx.errors import PpclError
from ppcl_fx.ir.graphs import ancestors, attribute, descendants, module_paths
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.ir.switches import is_switch, under
from ppcl_fx.tracing.guards import is_guard
from ppcl_fx.tracing.leaves import has_attention

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Block:
    """One transformer block of a graph, ``transformer_blocks.3``: `stack` is its `ModuleList`, `index` its number
    there.

    `nodes` are in graph order, guards included; `inputs` and `outputs` have for each stream the node that enters the
    block and the one that leaves it.
    """

    path: str
    stack: str
    index: int
    nodes: tuple[Node, ...] = field(repr=False)
    inputs: dict[str, Node]
    outputs: dict[str, Node]


@dataclass(frozen=True)
class Stack:
    """A maximal run of consecutive isomorphic blocks, in order.

    Its name is the path of the `ModuleList`, with ``:first-last`` where the list holds more than one stack. Of its
    streams, the chained tensors, ``image`` is the one that the model's output is read from, and the next is ``text``.
    """

    name: str
    blocks: tuple[Block, ...]
    streams: tuple[str, ...]


def stacks(gm: GraphModule) -> list[Stack]:
    """Find the stacks of a traced or exported graph, in the order of computation. Raises `PpclError`: the graph holds
    no transformer blocks.
    """
    regions = block_regions(gm)
    runs = _runs(gm, regions)
    if not runs:
        raise PpclError("the graph holds no transformer blocks; trace a diffusion transformer with ppcl_fx.trace")
    found: list[Stack] = []
    for run in reversed(runs):  # backwards, because the image stream is known by the model's output
        found.insert(0, _stack(gm, run, regions, found, runs))
    return _settled(found)


def block_regions(gm: GraphModule) -> dict[str, list[Node]]:
    """Return the nodes of each block by the block's path, in graph order.

    Where the trace noted the blocks they are taken from there; in exported graphs they are the outermost numbered
    modules that hold attention.
    """
    noted = graph_info(gm).get("blocks")
    regions: dict[str, list[Node]] = {path: [] for path in noted} if noted else {}
    for node in gm.graph.nodes:
        for path in module_paths(node):
            if path in regions or (not noted and path.rpartition(".")[2].isdigit()):
                regions.setdefault(path, []).append(node)
                break
    if noted:
        return {path: nodes for path, nodes in regions.items() if nodes}
    lists: dict[str, list[str]] = {}
    for path in regions:
        lists.setdefault(path.rpartition(".")[0], []).append(path)
    kept = [paths for paths in lists.values() if all(_holds_attention(gm, regions[path]) for path in paths)]
    return _with_weights(gm, {path: regions[path] for paths in kept for path in paths})


def _with_weights(gm: GraphModule, regions: dict[str, list[Node]]) -> dict[str, list[Node]]:
    """Add the nodes that fetch a block's own weights, which exported graphs have at their beginning."""
    insides = {path: set(nodes) for path, nodes in regions.items()}
    weights: dict[str, list[Node]] = {path: [] for path in regions}
    for node in gm.graph.find_nodes(op="get_attr"):
        parts = str(node.target).split(".")
        path = next((p for p in (".".join(parts[:n]) for n in range(1, len(parts))) if p in regions), None)
        if path is not None and node.users and not module_paths(node) and insides[path].issuperset(node.users):
            weights[path].append(node)
    return {path: weights[path] + nodes for path, nodes in regions.items()}


def is_attention(gm: GraphModule, node: Node) -> bool:
    """Tell whether a node is an attention, whole or as an operation."""
    if node.op == "call_module":
        return has_attention(gm.get_submodule(str(node.target)))
    return any(word in str(node.target) for word in ("scaled_dot_product", "flash_attention"))


def _holds_attention(gm: GraphModule, nodes: Iterable[Node]) -> bool:
    return any(is_attention(gm, node) or (node.op != "call_module" and "softmax" in str(node.target)) for node in nodes)


def shape_of_block(gm: GraphModule, path: str, nodes: Iterable[Node]) -> str:
    """Return a hash that two blocks share exactly when their graphs and parameter shapes are the same."""
    local: dict[Node, str] = {}
    lines: list[str] = []

    def name(node: Node) -> str:
        return local.setdefault(under(node), f"in{len(local)}")

    for node in nodes:
        if is_guard(node):
            continue
        target = str(node.target)
        kind = ""
        if node.op in ("call_module", "get_attr"):
            target = target.removeprefix(f"{path}.")
            owner = attribute(gm, str(node.target))
            if isinstance(owner, torch.nn.Module):
                kind = str([(n, tuple(p.shape)) for n, p in owner.named_parameters()])
                kind += str([type(module).__qualname__ for module in owner.modules()])
            elif isinstance(owner, torch.Tensor):
                kind = str(tuple(owner.shape))
        text = repr(_renamed((node.args, node.kwargs), name))
        leaves_at = [position for owner, position in node.meta.get("block_out", ()) if owner == path]
        local[node] = f"n{len(lines)}"
        lines.append(f"{node.op} {target} {kind} {text} {leaves_at}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _renamed(argument: object, name: Callable[[Node], str]) -> object:
    """Return arguments with the names of their nodes; a tuple is as good as a list, which ``map_arg`` tells apart."""
    if isinstance(argument, Node):
        return name(argument)
    if isinstance(argument, (list, tuple)):
        return [_renamed(item, name) for item in argument]
    if isinstance(argument, dict):
        return {key: _renamed(item, name) for key, item in argument.items()}
    if isinstance(argument, slice):
        return ["slice", *(_renamed(item, name) for item in (argument.start, argument.stop, argument.step))]
    return str(argument)


def _runs(gm: GraphModule, regions: dict[str, list[Node]]) -> list[list[str]]:
    paths = sorted(regions, key=lambda path: next(n for n in regions[path] if n.op != "get_attr"))
    runs: list[list[str]] = []
    last: tuple[str, int, str] | None = None
    for path in paths:
        parent, _, number = path.rpartition(".")
        shape = shape_of_block(gm, path, regions[path])
        if last is not None and last == (parent, int(number) - 1, shape):
            runs[-1].append(path)
        else:
            runs.append([path])
        last = (parent, int(number), shape)
    return runs


def block_outputs(path: str, nodes: list[Node]) -> dict[int, Node]:
    """Return a block's outputs by position: as noted while tracing, else the nodes that are used outside of it."""
    inside = set(nodes)
    noted: dict[int, Node] = {}
    for node in nodes[0].graph.nodes:
        for owner, position in node.meta.get("block_out", ()):
            if owner == path:
                noted[position] = node
    if noted:
        return noted
    leaving = [n for n in nodes if any(user not in inside and not is_guard(user) for user in _readers(n))]
    return {nodes.index(node): node for node in leaving}


def _readers(node: Node) -> Iterator[Node]:
    """Yield who reads a value in the teacher: through switches, and without students and projectors."""
    for user in node.users:
        if is_switch(user):
            yield from _readers(user) if user.args[0] is node else ()
        elif not any(path.startswith(("students.", "projectors.")) for path in module_paths(user)):
            yield user


def _inputs(nodes: list[Node]) -> list[Node]:
    """Return the nodes a block takes from outside, in the order of their first use."""
    inside = set(nodes)
    return list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if under(n) not in inside))


def _stack(
    gm: GraphModule, run: list[str], regions: dict[str, list[Node]], following: list[Stack], runs: list[list[str]]
) -> Stack:
    outputs = {path: block_outputs(path, regions[path]) for path in run}
    names = _stream_names(gm, run, outputs, following)
    entry = _entry_indices(run, regions, outputs, names)
    blocks = []
    for path in run:
        parent, _, number = path.rpartition(".")
        outer = _inputs(regions[path])
        blocks.append(
            Block(
                path=path,
                stack=parent,
                index=int(number),
                nodes=tuple(regions[path]),
                inputs={name: outer[index] for name, index in entry.items() if index < len(outer)},
                outputs={name: outputs[path][at] for at, name in names.items() if at in outputs[path]},
            )
        )
    parent = run[0].rpartition(".")[0]
    several = sum(other[0].rpartition(".")[0] == parent for other in runs) > 1
    name = f"{parent}:{blocks[0].index}-{blocks[-1].index}" if several else parent
    return Stack(name=name, blocks=tuple(blocks), streams=tuple(names.values()))


def _stream_names(
    gm: GraphModule, run: list[str], outputs: dict[str, dict[int, Node]], following: list[Stack]
) -> dict[int, str]:
    """Name the output positions of a run's blocks."""
    last = outputs[run[-1]]
    # Not always the next one: two stacks may run beside each other into a third.
    after = (_names_after(last, stack.blocks[0]) for stack in following)
    found = next((names for names in after if names), {})
    if not following:
        output = gm.graph.output_node()
        read = [position for position, node in last.items() if output in descendants([node])]
        found = {max(read, key=lambda p: _tokens(last[p])): "image"} if read else {}
    free = iter(["text", "extra", *(f"extra{i}" for i in range(2, 9))])
    for position in sorted(outputs[run[0]]):
        if position not in found and isinstance(outputs[run[0]][position].meta.get("val"), torch.Tensor):
            found[position] = next(name for name in free if name not in found.values())
    return dict(sorted(found.items(), key=lambda item: (item[1] != "image", item[1] != "text", item[1])))


def _names_after(outputs: dict[int, Node], first: Block) -> dict[int, str]:
    """Name a block's outputs after the streams by which they enter the stack that follows.

    Where two of them enter by one stream (text and image in one sequence), the longer one keeps its name.
    """
    entering: dict[str, list[int]] = {}
    for position, node in outputs.items():
        reached = descendants([node], stop=_inputs(list(first.nodes)))
        for name, enters in first.inputs.items():
            # Only what lies between the two blocks links them: not what runs through the block itself.
            between = not _numbered_paths(enters) - _numbered_paths(node)
            if enters is node or (enters in reached and between):
                entering.setdefault(name, []).append(position)
                break
    return {max(at, key=lambda position: _tokens(outputs[position])): name for name, at in entering.items()}


def _settled(found: list[Stack]) -> list[Stack]:
    """Tell image from text where two stacks run beside each other into a third: the longer one is the image."""
    settled = []
    for stack in found:
        own = stack.blocks[-1].outputs.get("image")
        rivals = [s.blocks[-1].outputs["image"] for s in found if "image" in s.streams and s is not stack]
        apart = [] if own is None else [r for r in rivals if r not in ancestors([own]) and own not in ancestors([r])]
        if own is not None and "text" not in stack.streams and any(_tokens(r) > _tokens(own) for r in apart):
            blocks = [replace(b, inputs=_as_text(b.inputs), outputs=_as_text(b.outputs)) for b in stack.blocks]
            stack = replace(stack, blocks=tuple(blocks), streams=tuple(_as_text(dict.fromkeys(stack.streams))))
        settled.append(stack)
    return settled


def _as_text(streams: dict[str, _Value]) -> dict[str, _Value]:
    return {"text" if name == "image" else name: value for name, value in streams.items()}


def _tokens(node: Node) -> int:
    value = node.meta.get("val")
    return int(value.shape[1]) if isinstance(value, torch.Tensor) and value.ndim == 3 else 0


def _numbered_paths(node: Node) -> set[str]:
    """Return the numbered module paths a node itself was recorded in."""
    return {path for path in module_paths(node) if path.rpartition(".")[2].isdigit()}


def _entry_indices(
    run: list[str], regions: dict[str, list[Node]], outputs: dict[str, dict[int, Node]], names: dict[int, str]
) -> dict[str, int]:
    """Say for each stream which of a block's outer inputs (numbered by first use) it enters by."""
    entry: dict[str, int] = {}
    if len(run) < 2:
        return _entry_by_shape(regions[run[0]], outputs[run[0]], names)
    before, after = run[0], run[1]
    outer = _inputs(regions[after])
    for position, name in names.items():
        node = outputs[before].get(position)
        reached = set() if node is None else descendants([node], stop=outer)
        between = [n for n in outer if n in reached and n not in regions[before]]
        if node in outer or between:
            entry[name] = outer.index(node if node in outer else between[0])
    return entry


def _entry_by_shape(nodes: list[Node], outputs: dict[int, Node], names: dict[int, str]) -> dict[str, int]:
    """For a stack of one block: a stream enters by the input whose example has the shape of its output."""
    entry: dict[str, int] = {}
    for index, node in enumerate(_inputs(nodes)):
        value = node.meta.get("val")
        for position, name in names.items():
            out = outputs[position].meta.get("val") if position in outputs else None
            same = isinstance(value, torch.Tensor) and isinstance(out, torch.Tensor) and value.shape == out.shape
            if same and name not in entry and index not in entry.values():
                entry[name] = index
    return entry
