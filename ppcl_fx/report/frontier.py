"""What each size of the model costs: the frontier of parameters and predicted damage, and the steps along it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ppcl_fx.report.html import Html, join, section, table
from ppcl_fx.report.svg import Series, figure, line_chart
from ppcl_fx.schema.analysis import Redundancy
from ppcl_fx.schema.plan import Plan

if TYPE_CHECKING:
    from ppcl_fx.passes.selection.frontier import Point

ROWS = 20  # of the table; a deep model's frontier has hundreds of points


def frontier_section(redundancy: Redundancy, plan: Plan | None) -> Html:
    """Return the frontier as a chart and a table of steps; with a plan, where that lies is marked."""
    from ppcl_fx.passes.selection.frontier import frontier
    from ppcl_fx.passes.selection.select import Options

    points = frontier(redundancy, Options(budget=0, stream=redundancy.stream))
    if len(points) < 2:
        return join()
    lead = (
        "For every number of parameters the set of edits with the least predicted damage: depth intervals, "
        "feed-forward and text-stream projectors over all stacks, found by dynamic programming. Predicted damage sums "
        "Eq. 6 between what linear maps make of a part's input and what the teacher makes of it; it orders edits, and "
        "it is not a score."
    )
    parts = _chart(redundancy, points, plan), _table(redundancy, _spaced(points))
    return section("frontier", "What each size costs", lead, *parts)


def _chart(redundancy: Redundancy, points: Sequence[Point], plan: Plan | None) -> Html:
    whole = redundancy.teacher_params
    shown = [point for point in points if point.damage > 0]
    series = [
        Series("least predicted damage", [100 * p.params / whole for p in shown], [p.damage for p in shown], 0)
    ]
    if plan is not None and plan.edits and plan.params:
        from ppcl_fx.passes.selection.sensitivity import predicted

        damage = sum(edit.damage or 0.0 for edit in predicted(redundancy, plan).edits)
        if damage > 0:
            series.append(Series("the plan", [100 * plan.params / whole], [damage], 1, line=False, dots=True))
    drawn = line_chart(
        series,
        title="Predicted damage of the best edits for each share of the parameters",
        x_label="% of the parameters that stay",
        y_label="predicted damage",
        log_y=True,
        whole_x=False,
    )
    return figure(drawn, f"{len(points)} sizes, from the whole teacher to {points[-1].params:,} parameters.", series)


def _spaced(points: Sequence[Point]) -> list[Point]:
    """Return at most `ROWS` points, evenly spaced in parameters, the ends included."""
    if len(points) <= ROWS:
        return list(points)
    most, least = points[0].params, points[-1].params
    marks = [most - (most - least) * step / (ROWS - 1) for step in range(ROWS)]
    nearest = (min(points, key=lambda point: abs(point.params - mark)) for mark in marks)
    return list(dict.fromkeys(nearest))


def _table(redundancy: Redundancy, points: Sequence[Point]) -> Html:
    names = ["parameters", "share", "predicted damage", "given up since the row above", "given back"]
    rows = []
    before: list[str] = []
    for point in points:
        now = [edit.id for edit in point.edits]
        up = ", ".join(edit for edit in now if edit not in before) or "nothing"
        back = ", ".join(edit for edit in before if edit not in now)
        share = f"{point.params / redundancy.teacher_params:.1%}"
        rows.append((f"{point.params:,}", share, f"{point.damage:.4g}", up, back))
        before = now
    return table(names, rows, "Steps along the frontier, and what each gives up and gets back.", left=False)
