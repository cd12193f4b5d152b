"""Insertion of a plan's edits into a graph: the passes that make them, as a draft, and what the result counts."""

from __future__ import annotations

from torch.fx import GraphModule

from ppcl_fx.ir.graphs import Draft, draft, parameter_count
from ppcl_fx.passes.context import Context
from ppcl_fx.passes.contract import Pass, Pipeline
from ppcl_fx.passes.edits.depth import Depth
from ppcl_fx.passes.edits.ffn import Ffn
from ppcl_fx.passes.edits.plug import mixture_draft
from ppcl_fx.passes.edits.text_stream import TextStream
from ppcl_fx.schema.plan import FfnEdit, Plan, TextStreamEdit


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

