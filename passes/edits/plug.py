"""A plan's edits put into a graph; plugging: choose teacher or student at every switch, and drop what is not needed."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from ppcl_fx.ir.graphs import Draft, draft, finished, parameter_count
from ppcl_fx.ir.liveness import SINK
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.ir.switches import switches
from ppcl_fx.passes.context import Context
from ppcl_fx.passes.contract import Pass, Pipeline, Result
from ppcl_fx.passes.edits.depth import Depth
from ppcl_fx.passes.edits.ffn import Ffn
from ppcl_fx.passes.edits.text_stream import TextStream
from ppcl_fx.passes.lowering.dead_code import DeadCode
from ppcl_fx.passes.lowering.expand import Expand
from ppcl_fx.passes.lowering.narrow import Narrow
from ppcl_fx.schema.plan import FfnEdit, Plan, TextStreamEdit


@dataclass(frozen=True)
class Plug(Pass, name="plug", kind="rewrite", numerics="approximate"):
    """Resolve every switch: to the student for the given edits, to the teacher for all others.

    With no edit given the graph computes what the teacher computes, to the bit.
    """

    students: frozenset[str] = frozenset()

    def apply(self, gm: GraphModule) -> Result:
        found = switches(gm)
        for node in found:
            teacher, student, edit = node.args
            chosen = student if edit in self.students else teacher
            assert isinstance(chosen, Node)
            if node.meta.get(SINK):
                chosen.meta = {**chosen.meta, SINK: True}
            node.replace_all_uses_with(chosen)
            gm.graph.erase_node(node)
        return Result(gm, bool(found))


def plugged(gm: GraphModule, students: frozenset[str]) -> GraphModule:
    """Return the model that a pluggable graph is with the given edits plugged; `gm` stays as it is.

    Parameters are shared with `gm`; nothing that the mixture does not use is left in the result.
    """
    return finished(mixture_draft(gm, students))


def mixture_draft(gm: GraphModule, students: frozenset[str]) -> Draft:
    """Return what `plugged` returns, as a draft: enough to look at or to count."""
    view = draft(gm)
    graph_info(view).pop("kinds", None)  # they are plugged one by one
    Pipeline([Plug(students), DeadCode(), Expand(), DeadCode(), Narrow(), DeadCode()])(view)
    return view


def edited(gm: GraphModule, plan: Plan) -> Draft:
    """Return a draft of a graph with a switch for every edit of a plan; raises as `ppcl_fx.rewrite`."""
    plan.check()
    made = draft(gm)
    Context.of(made).begin()
    Pipeline(passes_of(plan))(made)
    return made


def passes_of(plan: Plan) -> list[Pass]:
    """Return the passes that make a plan's edits, depth first: width edits work on what depth leaves."""
    made: list[Pass] = [Depth(edit.stack, edit.first, edit.last, edit.init) for edit in plan.depth()]
    for edit in plan.edits:
        if isinstance(edit, FfnEdit):
            made.append(Ffn(edit.stack, edit.block))
        elif isinstance(edit, TextStreamEdit):
            made.append(TextStream(edit.stack, edit.source, edit.last))
    return made


def count(gm: GraphModule, plan: Plan) -> int:
    """Return the exact number of parameters of a model with every edit of a plan plugged; only shapes matter."""
    return parameter_count(mixture_draft(edited(gm, plan), frozenset(plan.ids)))
