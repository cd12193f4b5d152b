"""Depth edits: a run of blocks becomes one (Sec. 3.3). Needs no knowledge of the model."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ppcl_fx.errors import Refusal, near
from ppcl_fx.ir.graphs import module_paths
from ppcl_fx.ir.liveness import SINK, mark
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.ir.stacks import Block, Stack, block_outputs, block_regions
from ppcl_fx.ir.switches import SWITCH, insert_switch, switches
from ppcl_fx.passes.context import Context
from ppcl_fx.passes.contract import Pass, Result
from ppcl_fx.passes.edits.residuals import residuals, with_residuals
from ppcl_fx.passes.lowering.dead_code import DeadCode
from ppcl_fx.schema.plan import DepthEdit
from ppcl_fx.tracing.guards import is_guard


def student_path(edit: DepthEdit) -> str:
    """Return the module path of a depth edit's student block."""
    return f"students.{edit.stack.replace('.', '_')}_{edit.first}_{edit.last}"


def interval(found: list[Stack], stack: str, first: int, last: int) -> list[Block]:
    """Return the blocks of an interval. Raises `Refusal`: there is no such list or block, or the interval leaves its
    stack.
    """
    names = sorted({block.stack for s in found for block in s.blocks})
    if stack not in names:
        raise Refusal(f"the model has no blocks {stack!r}{near(stack, names)}; it has {', '.join(names)}")
    at = {block.index: (s, block) for s in found for block in s.blocks if block.stack == stack}
    missing = [index for index in (first, last) if index not in at]
    if missing:
        raise Refusal(f"{stack} has no block {missing[0]}; its blocks are {min(at)} to {max(at)}")
    (home, begin), (other, end) = at[first], at[last]
    if home is not other:
        raise Refusal(
            f"the interval [{first}, {last}] of {stack} leaves its stack {home.name} "
            f"(blocks {home.blocks[0].index} to {home.blocks[-1].index}); an interval cannot cross from blocks of one "
            f"structure to another ({begin.nodes[0].name} to {end.nodes[0].name})"
        )
    return [block for block in home.blocks if first <= block.index <= last]


@dataclass(frozen=True)
class Depth(Pass, name="depth", kind="rewrite", numerics="exact"):
    """Put a switchable student beside the blocks ``first`` to ``last`` of a block list.

    The student is a copy of block ``first``, fed by that block's own inputs; the users of block ``last`` read its
    outputs through switches. What is added to a stream between the blocks (a ControlNet's residuals) is added behind
    the student. Nothing is removed: `Plug` chooses. Idempotent.
    """

    stack: str
    first: int
    last: int
    init: Literal["first", "middle"] = "first"

    @property
    def edit(self) -> DepthEdit:
        """The plan's line for this pass."""
        return DepthEdit(stack=self.stack, first=self.first, last=self.last, init=self.init)

    def apply(self, gm: GraphModule) -> Result:
        if switches(gm, self.edit.id):
            return Result(gm, False)
        context = Context.of(gm)
        run = interval(context.stacks, self.stack, self.first, self.last)
        begin, end = run[0], run[-1]
        self._check_free(gm, context)
        context.begin()
        path = student_path(self.edit)
        added = {stream: residuals(run, stream) for stream in end.outputs}
        copies = copy_nodes(begin.nodes, end.nodes[-1], begin.path, path)
        source = run[(len(run) - 1) // 2] if self.init == "middle" else begin
        gm.add_submodule(path, copy.deepcopy(gm.get_submodule(source.path)))
        inside = set(end.nodes)
        last = list(copies.values())[-1]
        for stream, teacher in end.outputs.items():
            student = with_residuals(copies[begin.outputs[stream]], added[stream], last)
            insert_switch(teacher, student, self.edit.id, path, stream, keep=lambda user: user in inside)
        for copied in copies.values():
            if not copied.users:
                copied.meta.pop(SINK, None)
        context.keep_stacks()
        kept = gm.get_submodule(path).state_dict()
        return Result(gm, True, names={f"{source.path}.{name}": f"{path}.{name}" for name in kept})

    def _check_free(self, gm: GraphModule, context: Context) -> None:
        """Raise `Refusal` where one of the blocks has an edit already: depth comes first, and once."""
        blocks = {f"{self.stack}.{index}" for index in range(self.first, self.last + 1)}
        spans = [span for span in context.spans if span.stack == self.stack]
        taken = [span.edit for span in spans if span.first <= self.last and self.first <= span.last]
        taken += [str(node.args[2]) for node in switches(gm) if node.meta[SWITCH]["block"] in blocks]
        if taken:
            raise Refusal(f"{self.edit.id}: {taken[0]} has edited a block of it already; make depth edits first")


@dataclass(frozen=True)
class CutDepth(Pass, name="cut-depth", kind="rewrite", numerics="approximate"):
    """Remove the blocks ``first + 1`` to ``last`` for good, in traced and in exported graphs.

    The users of block ``last``'s outputs are rewired to the corresponding outputs of block ``first``. Where a model
    indexes a side input by block number, the result is the model with identity blocks, not a renumbered one; what is
    added to a stream between the blocks goes on being added.
    """

    stack: str
    first: int
    last: int

    def apply(self, gm: GraphModule) -> Result:
        regions = block_regions(gm)
        gone = {f"{self.stack}.{i}" for i in range(self.first + 1, self.last + 1)}
        if f"{self.stack}.{self.first}" in regions and gone.isdisjoint(regions):
            return Result(gm, False)
        run = interval(Context.of(gm).stacks, self.stack, self.first, self.last)
        mark(gm)
        added = {stream: residuals(run, stream) for stream in run[-1].outputs}
        inside = set(run[-1].nodes)
        streams = {node: stream for stream, node in run[-1].outputs.items()}
        # The corresponding outputs of two isomorphic blocks, by position.
        first, last = (block_outputs(block.path, list(block.nodes)) for block in (run[0], run[-1]))
        for source, teacher in [(first[position], last[position]) for position in last if position in first]:
            source = with_residuals(source, added.get(streams.get(teacher, ""), []), teacher)
            teacher.replace_all_uses_with(source, delete_user_cb=lambda user: user not in inside)
            if teacher.meta.pop(SINK, False):
                source.meta[SINK] = True
        # Impure nodes would keep the removed blocks' parameters alive.
        for node in reversed(list(gm.graph.nodes)):
            if gone & set(module_paths(node)) and not node.users:
                gm.graph.erase_node(node)
        DeadCode().apply(gm)
        if "blocks" in graph_info(gm):
            graph_info(gm)["blocks"] = [path for path in graph_info(gm)["blocks"] if path not in gone]
        gm.delete_all_unused_submodules()
        return Result(gm, True)


def copy_nodes(nodes: Iterable[Node], after: Node, old: str, new: str) -> dict[Node, Node]:
    """Copy nodes behind another node; module targets and paths below `old` become paths below `new`.

    Guards are not copied: the copies answer to the same inputs as the nodes they were copied from, by which they are
    returned.
    """
    copies: dict[Node, Node] = {}
    graph = after.graph
    at = after
    for node in nodes:
        if is_guard(node):
            continue
        target = moved(str(node.target), old, new) if node.op in ("call_module", "get_attr") else node.target
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: copies.get(n, n))
        with graph.inserting_after(at):
            at = copies[node] = graph.create_node(node.op, target, args, kwargs, name=f"student_{node.name}")
        at.meta = _moved_meta(node, old, new)
    return copies


def moved(path: str, old: str, new: str) -> str:
    """Return a dotted path with the prefix `old` replaced by `new`."""
    return new + path[len(old) :] if path == old or path.startswith(f"{old}.") else path


def _moved_meta(node: Node, old: str, new: str) -> dict[str, object]:
    meta = {key: value for key, value in node.meta.items() if key not in ("block_in", "block_out", "ppcl")}
    entries = [(moved(path, old, new), kind) for path, kind in (node.meta.get("nn_module_stack") or {}).values()]
    meta["nn_module_stack"] = OrderedDict((entry[0], entry) for entry in entries)
    noted = tuple((new, position) for path, position in node.meta.get("block_out", ()) if path == old)
    return {**meta, "block_out": noted} if noted else meta
