"""What passes look up about a graph, blocks and sites: found once, and again after an edit."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

from torch.fx import GraphModule

from ppcl_fx.errors import Refusal
from ppcl_fx.ir.graphs import module_paths
from ppcl_fx.ir.liveness import mark
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.ir.stacks import Block, Stack, stacks
from ppcl_fx.ir.switches import SWITCH, surface, switches
from ppcl_fx.passes.edits.residuals import bare

_DEPTH = re.compile(r"depth:(.+)\.(\d+)-(\d+)")


class Span(NamedTuple):
    """A depth edit of a graph: the blocks that its student stands for, and the student's module path."""

    edit: str
    stack: str
    first: int
    last: int
    student: str


class Context:
    """Stacks and depth edits of one graph module, each found once.

    A pass takes its context from `Context.of` and asks it before it edits; an edit that leaves the teacher's blocks as
    they were ends with `keep_stacks`.
    """

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self._stamp = _stamp(gm)

    @classmethod
    def of(cls, gm: GraphModule) -> Context:
        """Return the context of a graph module as it is now, another one where it or its modules were edited."""
        known = gm.graph.__dict__.get("_ppcl_context")
        if not isinstance(known, cls) or known.gm is not gm or known._stamp != _stamp(gm):
            known = gm.graph.__dict__["_ppcl_context"] = cls(gm)
        return known

    @cached_property
    def stacks(self) -> list[Stack]:
        """The stacks of the graph; in a pluggable one those of the teacher."""
        return stacks(self.gm)

    @cached_property
    def spans(self) -> list[Span]:
        """The depth edits that the graph has."""
        found: dict[str, Span] = {}
        for node in switches(self.gm):
            said = _DEPTH.fullmatch(str(node.args[2]))
            if said is not None:
                stack, first, last = said.groups()
                found.setdefault(said[0], Span(said[0], stack, int(first), int(last), node.meta[SWITCH]["block"]))
        return list(found.values())

    def teacher(self, edit: str, stack: str, index: int) -> Block:
        """Return a block of the teacher; raise `Refusal` in the name of `edit` where there is none."""
        blocks = [block for found in self.stacks for block in found.blocks]
        for block in blocks:
            if (block.stack, block.index) == (stack, index):
                return block
        names = sorted({block.stack for block in blocks})
        raise Refusal(f"{edit}: the model has no block {stack}.{index}; its block lists are {', '.join(names)}")

    def block(self, edit: str, stack: str, index: int) -> Block:
        """Return the block that a width edit works on; its inputs are what it reads now, after the edits before it.

        That is a depth edit's student in the place of its interval's first block; `Refusal` for the other blocks of it.
        """
        found = self.teacher(edit, stack, index)
        for span in self.spans:
            if span.stack == stack and span.first == index:
                found = self._student(span, found)
            elif span.stack == stack and span.first < index <= span.last:
                raise Refusal(
                    f"{edit}: {found.path} lies inside a depth interval of the plan; only its first block can be edited"
                )
        return replace(found, inputs={stream: surface(node) for stream, node in found.inputs.items()})

    def begin(self) -> None:
        """Note on the graph, before the first edit, what it computes for nothing and what its blocks give. Raises
        `Refusal`: the graph does not hold its weights.
        """
        blocks = [block for stack in self.stacks for block in stack.blocks]
        present = dict(self.gm.named_modules(remove_duplicate=False))
        lifted = [block.path for block in blocks if block.path not in present]
        if lifted:
            raise Refusal(
                f"the graph has the weights of {lifted[0]} among its inputs; edit what ExportedProgram.module() "
                "or ppcl_fx.trace gives"
            )
        mark(self.gm)
        ends = {block.path: {stream: node.name for stream, node in block.outputs.items()} for block in blocks}
        graph_info(self.gm)["ends"] = ends

    def keep_stacks(self) -> None:
        """Say, after an edit, that it left the teacher's blocks as they were: they need not be found again."""
        self._stamp = _stamp(self.gm)
        self.__dict__.pop("spans", None)

    def _student(self, span: Span, begin: Block) -> Block:
        """Return the student of a depth edit as a block: block ``first`` under another path."""
        nodes = tuple(n for n in self.gm.graph.nodes if span.student in module_paths(n))
        found = switches(self.gm, span.edit)
        outputs = {str(n.meta[SWITCH]["stream"]): bare(n.args[1]) for n in found}  # type: ignore[arg-type]
        return Block(span.student, span.stack, span.first, nodes, begin.inputs, outputs)


def _stamp(gm: GraphModule) -> tuple[list[Any], ...]:
    """Return what every edit changes. It holds the objects, so no other can get their identity."""
    nodes = [(node, node.target, node.args, node.kwargs) for node in gm.graph.nodes]
    modules = [module for _, module in gm.named_modules(remove_duplicate=False)]
    return nodes, modules, list(graph_info(gm).get("blocks", ()))
