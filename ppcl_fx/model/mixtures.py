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
    check_keep(keep)
    least = model.param_count(model.edits)
    if least > keep * model.teacher_params:
        raise PpclError(
            f"keep={keep:g} is out of reach: with all {len(model.edits)} edits of the plan "
            f"{least / model.teacher_params:.3f} of the parameters stay; select a plan for a smaller share"
        )
    budget = keep * model.teacher_params
    if model.effects is None:
        return swapped_back(model, budget)
    return _measured(model, math.floor(budget), model.effects.errors)


def _measured(model: PluggableModel, budget: int, errors: Mapping[str, float]) -> tuple[str, ...]:
    """Return the edits with the least summed error that leave at most `budget` parameters."""
    found = least_within(touching(model.plan.edits), model.param_count, errors, budget)
    if found is not None:
        return tuple(edit for edit in model.edits if edit in found)
    # All students together meet the budget, so this is about savings that depend on each other over a distance.
    _log.warning("the edits' savings depend on each other in an unknown way; students are swapped back one by one")
    return swapped_back(model, budget, errors)


def swapped_back(
    model: PluggableModel, budget: float, damage: Mapping[str, float] | None = None
) -> tuple[str, ...]:
    """Return the edits that stay plugged when as many as fit into `budget` parameters go back to the teacher.

    See `choose`. Where all students together save too little, all stay. `damage` is each edit's; by default what the
    plan predicts.
    """
    if damage is None:
        damage = {edit.id: edit.damage or 0.0 for edit in model.plan.edits}
    summed = _Summed(model)
    found = _swapped(model, budget, damage, summed)
    if model.param_count(found) == summed(found):
        return found
    return _swapped(model, budget, damage, model.param_count)  # savings that depend on each other over a distance


def _swapped(
    model: PluggableModel, budget: float, damage: Mapping[str, float], params: Callable[[Sequence[str]], int]
) -> tuple[str, ...]:
    plugged = list(model.edits)
    worst = [damage[edit] for edit in plugged]
    order = sorted(range(len(plugged)), key=lambda i: (-worst[i], -i))
    for edit in [model.edits[i] for i in order]:
        without = [other for other in plugged if other != edit]
        if params(without) <= budget:
            plugged = without
    return tuple(plugged)


class _Summed:
    """Parameters of mixtures, from what each group of edits that touch saves alone: fewer mixtures are counted."""

    def __init__(self, model: PluggableModel) -> None:
        touch = touching(model.plan.edits)
        graph = nx.Graph([(edit, other) for edit, others in touch.items() for other in others])
        graph.add_nodes_from(touch)
        self.groups = [frozenset(group) for group in nx.connected_components(graph)]
        self.model = model

    def __call__(self, students: Sequence[str]) -> int:
        whole = self.model.param_count(())
        parts = (group.intersection(students) for group in self.groups)
        return whole - sum(whole - self.model.param_count(tuple(part)) for part in parts if part)


def check_keep(keep: float) -> None:
    """Raise `PpclError` unless a share of parameters lies in (0, 1]."""
    if not 0.0 < keep <= 1.0:
        raise PpclError(
            f"keep is the share of parameters that stays, in (0, 1]; {keep:g} is outside, give for example 0.5"
        )


def mixture(model: PluggableModel, students: Sequence[str]) -> GraphModule:
    """Return the plain graph of `model` with `students` plugged in, its parameters shared, and plug back what
    was.
    """
    before = tuple(model.students)
    try:
        return model.plug(students=list(students)).graph_module()
    finally:
        model.plug(students=list(before))
