"""Which students to plug for a share of the teacher's parameters."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import networkx as nx
from torch.fx import GraphModule

from ppcl_fx.errors import PpclError
from ppcl_fx.passes.selection.knapsack import least_within, touching

if TYPE_CHECKING:
    from ppcl_fx.model.pluggable import PluggableModel

_log = logging.getLogger("ppcl_fx")


def choose(model: PluggableModel, keep: float) -> tuple[str, ...]:
    """Return the edits to plug so that at most `keep` of the teacher's parameters stay.

    Where the model has measured effects (`ppcl_fx.schema.measured_effects`), they are the edits with the least sum of
    effects of all sets that meet the budget.

    Otherwise it starts from every student and swaps back to the teacher, one by one, the student that the plan
    predicts to do most damage, as long as the exact count stays within the budget (the paper's 12 B and 14 B models
    are its 10 B model with students swapped back). Edits without a prediction count as the least damaging, the plan's
    later ones first.

    Raises:
        PpclError: `keep` is not in (0, 1], or all students together save too little.
    """
    if not 0.0 < keep <= 1.0:
        raise PpclError(
            f"keep is the share of parameters that stays, in (0, 1]; {keep:g} is outside, give for example 0.5"
        )
    least, budget = model.param_count(model.edits), keep * model.teacher_params
    if least > budget:
        raise PpclError(
            f"keep={keep:g} is out of reach: with all {len(model.edits)} edits of the plan "
            f"{least / model.teacher_params:.3f} of the parameters stay; select a plan for a smaller share"
        )
    if model.effects is None:
        return swapped_back(model, budget)
    errors, whole = model.effects.errors, math.floor(budget)
    found = least_within(touching(model.plan.edits), model.param_count, errors, whole)
    if found is not None:
        return tuple(edit for edit in model.edits if edit in found)
    # All students together meet the budget, so this is about savings that depend on each other over a distance.
    _log.warning("the edits' savings depend on each other in an unknown way; students are swapped back one by one")
    return swapped_back(model, whole, errors)


def swapped_back(
    model: PluggableModel, budget: float, damage: Mapping[str, float] | None = None
) -> tuple[str, ...]:
    """Return the edits that stay plugged when as many as fit into `budget` parameters go back to the teacher.

    See `choose`. Where all students together save too little, all stay. `damage` is each edit's, by default predicted.
    """
    if damage is None:
        damage = {edit.id: edit.damage or 0.0 for edit in model.plan.edits}
    summed = _summed(model)
    found = _swapped(model, budget, damage, summed)
    if model.param_count(found) == summed(found):
        return found
    return _swapped(model, budget, damage, model.param_count)  # savings that depend on each other over a distance


def _swapped(
    model: PluggableModel, budget: float, damage: Mapping[str, float], params: Callable[[Sequence[str]], int]
) -> tuple[str, ...]:
    plugged = list(model.edits)
    for edit in sorted(plugged, key=lambda edit: damage[edit])[::-1]:
        without = [other for other in plugged if other != edit]
        if params(without) <= budget:
            plugged = without
    return tuple(plugged)


def _summed(model: PluggableModel) -> Callable[[Sequence[str]], int]:
    """Count mixtures by what each group of edits that touch saves alone: fewer mixtures are made."""
    graph = nx.Graph(touching(model.plan.edits))
    groups = [frozenset(group) for group in nx.connected_components(graph)]
    whole = model.param_count(())

    def params(students: Sequence[str]) -> int:
        inside = (group.intersection(students) for group in groups)
        return whole - sum(whole - model.param_count(tuple(part)) for part in inside if part)

    return params


def mixture(model: PluggableModel, students: Sequence[str]) -> GraphModule:
    """Return the plain graph of `model` with `students` plugged in, parameters shared, and plug back what was."""
    before = model.students
    try:
        return model.plug(students=students).graph_module()
    finally:
        model.plug(students=before)
