"""What each size of the model costs: the frontier of parameters and predicted damage, and the steps along it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ppcl_fx.report.svg import LineChart, Series
from ppcl_fx.schema.analysis import Redundancy
from ppcl_fx.schema.plan import Plan

if TYPE_CHECKING:
    from ppcl_fx.passes.selection.frontier import Point

ROWS = 20  # of the table; a deep model's frontier has hundreds of points


def frontier_view(redundancy: Redundancy, plan: Plan | None) -> dict[str, Any] | None:
    """Return the chart, with where the plan lies, and the steps of a table; None where there is one size."""
    from ppcl_fx.passes.selection.frontier import frontier
    from ppcl_fx.passes.selection.select import Options

    points = frontier(redundancy, Options(budget=0, stream=redundancy.stream))
    if len(points) < 2:
        return None
    words = f"{len(points)} sizes, from the whole teacher to {points[-1].params:,} parameters."
    return {"chart": _chart(redundancy, points, plan), "words": words, "steps": _steps(redundancy, _spaced(points))}


def _chart(redundancy: Redundancy, points: Sequence[Point], plan: Plan | None) -> LineChart:
    whole = redundancy.teacher_params
    shown = [point for point in points if point.damage > 0]
    shares = [100 * point.params / whole for point in shown]
    series = [Series("least predicted damage", shares, [point.damage for point in shown], 0)]
    if plan is not None and plan.edits and plan.params:
        from ppcl_fx.passes.selection.sensitivity import predicted

        damage = sum(edit.damage or 0.0 for edit in predicted(redundancy, plan).edits)
        if damage > 0:
            series.append(Series("the plan", [100 * plan.params / whole], [damage], 1, line=False, dots=True))
    title = "Predicted damage of the best edits for each share of the parameters"
    labels = "% of the parameters that stay", "predicted damage"
    return LineChart(series, title, labels, log_y=True, whole_x=False)


def _spaced(points: Sequence[Point]) -> list[Point]:
    """Return at most `ROWS` points, evenly spaced in parameters, the ends included."""
    if len(points) <= ROWS:
        return list(points)
    most, least = points[0].params, points[-1].params
    marks = [most - (most - least) * step / (ROWS - 1) for step in range(ROWS)]
    nearest = (min(points, key=lambda point: abs(point.params - mark)) for mark in marks)
    return list(dict.fromkeys(nearest))


def _steps(redundancy: Redundancy, points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return the rows of the table: sizes, and which edits come and go from one to the next."""
    rows = []
    before: list[str] = []
    for point in points:
        now = [edit.id for edit in point.edits]
        row = {"params": point.params, "share": point.params / redundancy.teacher_params, "damage": point.damage}
        up, back = [e for e in now if e not in before], [e for e in before if e not in now]
        rows.append({**row, "up": up, "back": back})
        before = now
    return rows
