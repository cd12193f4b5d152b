"""From a plan to a pluggable graph: teacher and student parts side by side, a switch for each edit."""

from __future__ import annotations

import copy

from torch import nn
from torch.fx import GraphModule

from ppcl_fx.calls.store import Calls
from ppcl_fx.errors import PpclError
from ppcl_fx.ir.graphs import finished
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.model.retrace import over
from ppcl_fx.passes.calibration.initialise import fit_projectors
from ppcl_fx.passes.edits.plug import edited
from ppcl_fx.schema.plan import Plan


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
    mine = graph_info(gm).get("model", "")
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
    kinds = graph_info(gm).get("kinds") or {}
    # The edits are made without weights, and then put over the students that are there.
    graph_info(made)["kinds"] = {
        kind: over(made, finished(edited(_weightless(other), plan))) for kind, other in kinds.items()
    }
    return made


def _weightless(gm: GraphModule) -> GraphModule:
    """Return a copy whose parameters are on the meta device."""
    empty = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in gm.parameters()}
    return copy.deepcopy(gm, dict(empty))
