"""From a plan to a pluggable graph: teacher and student parts side by side, a switch for each edit."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

from torch import nn
from torch.fx import GraphModule

from ppcl_fx.calls import Calls
from ppcl_fx.errors import PpclError, Refusal
from ppcl_fx.graphs import Draft, draft, finished, parameter_count
from ppcl_fx.model import PluggableModel
from ppcl_fx.passes.contract import Result, options
from ppcl_fx.passes.depth import Depth, interval, student_path
from ppcl_fx.passes.ffn import Ffn
from ppcl_fx.passes.initialise import fit_projectors
from ppcl_fx.passes.liveness import mark
from ppcl_fx.passes.plug import mixture_draft
from ppcl_fx.passes.residuals import bare
from ppcl_fx.passes.switches import surface, switches
from ppcl_fx.passes.text_stream import TextStream
from ppcl_fx.plan import DepthEdit, FfnEdit, Plan, TextStreamEdit
from ppcl_fx.retrace import over
from ppcl_fx.stacks import Block, Stack, stacks


def rewrite(gm: GraphModule, plan: Plan, calls: Calls | None = None) -> PluggableModel:
    """Rewrite a traced teacher by a plan into a pluggable model, with no edit plugged.

    Args:
        gm: the traced teacher; stays as it is, and its parameters are shared.
        plan: the edits.
        calls: recorded calls to initialise the projectors by least squares; without them they start as the identity.

    Raises:
        PpclError: the plan was made for another model, or contradicts itself.
        Refusal: an edit does not fit the model; the message says why.
    """
    mine = gm.meta.get("ppcl", {}).get("model", "")
    check_made_for(plan, mine)
    graph = insert_edits(gm, plan)
    if calls is not None:
        fit_projectors(graph, (call.kwargs for call in calls))
    model = PluggableModel(graph, plan.model_copy(update={"model": plan.model or mine}))
    return model.train(gm.training)


def check_made_for(plan: Plan, model: str) -> None:
    """Raise `PpclError` where a plan was made for another model than that of the fingerprint `model`."""
    if plan.model and model and plan.model != model:
        raise PpclError(
            f"the plan was made for another model (fingerprint {plan.model[:12]}, this one is {model[:12]}); "
            "analyse this model and select again"
        )


def insert_edits(gm: GraphModule, plan: Plan) -> GraphModule:
    """Return a pluggable graph: `gm` with a switch for every edit of the plan. `gm` itself stays as it is.

    Idempotent: edits that the graph has already are left alone.

    Raises:
        PpclError: the plan contradicts itself.
        Refusal: an edit does not fit the model; the message says why.
    """
    made = finished(edited(gm, plan))
    kinds = made.meta["ppcl"].get("kinds") or {}
    # The edits are made without weights, and then put over the students that are there.
    made.meta["ppcl"]["kinds"] = {
        kind: over(made, finished(edited(_weightless(other), plan))) for kind, other in kinds.items()
    }
    return made


def _weightless(gm: GraphModule) -> GraphModule:
    """Return a copy whose parameters are on the meta device."""
    empty = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in gm.parameters()}
    return copy.deepcopy(gm, dict(empty))


def edited(gm: GraphModule, plan: Plan) -> Draft:
    """Return what `insert_edits` returns, as a draft."""
    plan.check()
    gm = draft(gm)
    mark(gm)
    have = {str(node.args[2]) for node in switches(gm)}
    found = stacks(gm)
    teacher = {block.path: block for stack in found for block in stack.blocks}
    current = dict(teacher)
    gm.meta["ppcl"]["ends"] = {
        path: {stream: node.name for stream, node in block.outputs.items()} for path, block in teacher.items()
    }
    for edit in plan.depth():
        _, begin, _ = interval(found, edit.stack, edit.first, edit.last)
        for index in range(edit.first, edit.last + 1):
            current.pop(f"{edit.stack}.{index}")
        if edit.id not in have:
            pass_ = Depth(edit.stack, edit.first, edit.last, edit.init)
            _record(gm, pass_, pass_.insert(gm, *interval(found, edit.stack, edit.first, edit.last)))
        current[begin.path] = _student_block(gm, edit, begin)
    for width in plan.edits:
        if width.id in have:
            continue
        if isinstance(width, FfnEdit):
            block = _block(found, current, width.id, width.stack, width.block)
            ffn = Ffn(width.stack, width.block)
            _record(gm, ffn, ffn.insert(gm, block))
        elif isinstance(width, TextStreamEdit):
            source, blocks = _group(found, current, width, plan.depth(width.stack))
            text = TextStream(width.stack, width.source, width.last)
            _record(gm, text, text.insert(gm, source, blocks))
    gm.graph.lint()
    return gm


def _record(gm: GraphModule, pass_: Depth | Ffn | TextStream, result: Result) -> None:
    info = gm.meta["ppcl"] = dict(gm.meta["ppcl"])
    info["passes"] = [*info.get("passes", []), {"name": pass_.name, "options": options(pass_)}]
    info["names"] = {**info.get("names", {}), **result.names}


def _student_block(gm: GraphModule, edit: DepthEdit, begin: Block) -> Block:
    """Return the student of a depth edit as a block: block ``first`` under another path."""
    path = student_path(edit)
    nodes = tuple(n for n in gm.graph.nodes if path in (n.meta.get("nn_module_stack") or {}))
    outputs = {
        str(node.meta["ppcl_switch"]["stream"]): bare(node.args[1])  # type: ignore[arg-type]
        for node in switches(gm, edit.id)
    }
    return Block(path, edit.stack, edit.first, nodes, begin.inputs, outputs)


def _block(found: list[Stack], current: dict[str, Block], edit: str, stack: str, index: int) -> Block:
    path = f"{stack}.{index}"
    if path in current:
        return _facing(current[path])
    if any(block.path == path for s in found for block in s.blocks):
        raise Refusal(f"{edit}: {path} lies inside a depth interval of the plan; only its first block can be edited")
    names = sorted({block.stack for s in found for block in s.blocks})
    raise Refusal(f"{edit}: the model has no block {path}; its block lists are {', '.join(names)}")


def _group(
    found: list[Stack], current: dict[str, Block], edit: TextStreamEdit, intervals: Iterable[DepthEdit]
) -> tuple[Block, list[Block]]:
    """Return a text group's source and those of its blocks that the depth edits left."""
    source = _block(found, current, edit.id, edit.stack, edit.source)
    for depth in intervals:
        if depth.first <= edit.source <= depth.last:
            raise Refusal(f"{edit.id}: its source block {edit.source} lies in {depth.id}; choose a source outside")
        if depth.first <= edit.last < depth.last:
            raise Refusal(f"{edit.id}: it ends inside {depth.id}; let it end at {depth.first - 1} or {depth.last}")
    _block(found, {b.path: b for s in found for b in s.blocks}, edit.id, edit.stack, edit.last)
    wanted = [f"{edit.stack}.{i}" for i in range(edit.source + 1, edit.last + 1)]
    return source, [_facing(current[path]) for path in wanted if path in current]


def _facing(block: Block) -> Block:
    """Return a block whose inputs are what it reads now, after the edits before it."""
    return replace(block, inputs={stream: surface(node) for stream, node in block.inputs.items()})


def count(gm: GraphModule, plan: Plan) -> int:
    """Return the exact number of parameters of a model with every edit of a plan plugged.

    Args:
        gm: the traced teacher; only shapes matter, the meta device will do.
        plan: the edits.
    """
    return parameter_count(mixture_draft(edited(gm, plan), frozenset(plan.ids)))

