"""Which students to plug for a share of the teacher's parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ppcl_fx.errors import PpclError

if TYPE_CHECKING:
    from ppcl_fx.model import PluggableModel


def choose(model: PluggableModel, keep: float) -> tuple[str, ...]:
    """Return the edits to plug so that at most `keep` of the teacher's parameters stay.

    Starts from every student and swaps back to the teacher, one by one, the student that the plan predicts to do
    most damage, as long as the exact count stays within the budget (the paper's 12 B and 14 B models are its 10 B
    model with students swapped back). Edits without a prediction count as the least damaging, the plan's later ones
    first.

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
    return swapped_back(model, keep * model.teacher_params)


def swapped_back(model: PluggableModel, budget: float) -> tuple[str, ...]:
    """Return the edits that stay plugged when as many as fit into `budget` parameters go back to the teacher.

    See `choose`. Where all students together save too little, all stay.
    """
    plugged = list(model.edits)
    order = sorted(range(len(plugged)), key=lambda i: (-(model.plan.edits[i].damage or 0.0), -i))
    for edit in [model.edits[i] for i in order]:
        without = [other for other in plugged if other != edit]
        if model.param_count(without) <= budget:
            plugged = without
    return tuple(plugged)


def check_keep(keep: float) -> None:
    """Raise `PpclError` unless a share of parameters lies in (0, 1]."""
    if not 0.0 < keep <= 1.0:
        raise PpclError(
            f"keep is the share of parameters that stays, in (0, 1]; {keep:g} is outside, give for example 0.5"
        )
