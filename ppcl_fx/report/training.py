"""Distillation: the loss of each edit in each stage, and what each student does to the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ppcl_fx.report.svg import LineChart, Series
from ppcl_fx.schema.measured_effects import Effects

Losses = Mapping[str, Mapping[str, Sequence[float]]]  # stage -> edit id -> loss of each step
_POINTS = 240


def losses_view(losses: Losses) -> list[dict[str, Any]]:
    """Return a chart for each stage that has steps, and the rows of a table of first and last losses."""
    return [_stage(name, curves) for name, curves in losses.items() if any(curves.values())]


def smooth(values: Sequence[float], points: int = _POINTS) -> tuple[list[float], list[float]]:
    """Return (steps, means) of at most `points` equal pieces of `values`: a long curve stays small."""
    size = max(1, -(-len(values) // points))
    pieces = [values[i : i + size] for i in range(0, len(values), size)]
    steps = [i * size + (len(piece) - 1) / 2 + 1 for i, piece in enumerate(pieces)]
    return steps, [sum(piece) / len(piece) for piece in pieces]


def _stage(name: str, curves: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    named = {edit: values for edit, values in curves.items() if values}
    steps = max(map(len, named.values()))
    series = [Series(edit, *smooth(values), colour=i) for i, (edit, values) in enumerate(named.items())]
    title = f"Loss of each edit over {steps} steps of the stage {name}"
    chart = LineChart(series, title, ("step", "loss"), (520, 270), log_y=True)
    tenths = [(edit, values, max(1, len(values) // 10)) for edit, values in named.items()]
    rows = [(edit, sum(values[:n]) / n, sum(values[-n:]) / n) for edit, values, n in tenths]
    return {"name": name, "steps": steps, "chart": chart, "rows": rows}


def effects_view(effects: Effects) -> dict[str, Any]:
    """Return the effects, and the chart of predicted against measured error for several sizes of the model."""
    shares = [100 * mixture.keep for mixture in effects.mixtures]
    series = [
        Series("predicted", shares, [mixture.predicted for mixture in effects.mixtures], 0, dots=True),
        Series("measured", shares, [mixture.measured for mixture in effects.mixtures], 1, dots=True),
    ]
    title = "Predicted and measured error of the output for each share of the parameters"
    labels = "% of the parameters that may stay", "relative error"
    return {"effects": effects, "chart": LineChart(series, title, labels, (720, 260), log_y=True, whole_x=False)}
