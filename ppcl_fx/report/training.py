"""Loss curves of the distillation, one line an edit, one chart a stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ppcl_fx.report.html import Html, join, section, table, tag
from ppcl_fx.report.svg import COLOURS, Series, line_chart

Losses = Mapping[str, Mapping[str, Sequence[float]]]  # stage -> edit id -> loss of each step
_POINTS = 240


def losses_section(losses: Losses) -> Html:
    """Return one chart for each stage that has steps, with a table of first and last losses."""
    stages = [_stage(name, curves) for name, curves in losses.items() if any(curves.values())]
    if not stages:
        stages = [tag("p", "No step was trained.", class_="note")]
    words = "One line an edit, one chart a stage. The scale is logarithmic."
    return section("losses", "Distillation", words, stages)


def smooth(values: Sequence[float], points: int = _POINTS) -> tuple[list[float], list[float]]:
    """Return (steps, means) of at most `points` equal pieces of `values`: a long curve stays small."""
    size = max(1, -(-len(values) // points))
    pieces = [values[i : i + size] for i in range(0, len(values), size)]
    steps = [i * size + (len(piece) - 1) / 2 + 1 for i, piece in enumerate(pieces)]
    return steps, [sum(piece) / len(piece) for piece in pieces]


def _stage(name: str, curves: Mapping[str, Sequence[float]]) -> Html:
    named = [(edit, list(values)) for edit, values in curves.items() if len(values)]
    series = [Series(edit, *smooth(values), colour=i % COLOURS) for i, (edit, values) in enumerate(named)]
    steps = max(len(values) for _, values in named)
    drawn = line_chart(
        series,
        title=f"Loss of each edit over {steps} steps of the stage {name}",
        x_label="step",
        y_label="loss",
        size=(520, 270),
        log_y=True,
    )
    rows = [_row(index, edit, values) for index, (edit, values) in enumerate(named)]
    compared = table(["edit", "first", "last"], rows, "Means of the first and the last tenth of the steps.")
    head = tag("h3", f"{name} ", tag("small", f"{steps} steps"))
    return join(head, tag("div", tag("figure", drawn), compared, class_="pair"))


def _row(index: int, edit: str, values: Sequence[float]) -> tuple[list[str | Html], str, str]:
    tenth = max(1, len(values) // 10)
    begin, end = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
    style = "display:inline-block;width:14px;height:4px;margin-right:8px"
    return [tag("i", class_=f"k{index % COLOURS}", style=style), edit], f"{begin:.4g}", f"{end:.4g}"
