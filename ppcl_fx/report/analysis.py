"""What the analysis found: heatmaps, Delta curves and their intervals, probe fit, text streams, FFNs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ppcl_fx.report.blockmap import BlockMap, StackEdits
from ppcl_fx.report.heatmap import Heatmap, value_range
from ppcl_fx.report.svg import LineChart, Series
from ppcl_fx.schema.analysis import Interval, Redundancy, StackAnalysis, StreamCurves
from ppcl_fx.schema.plan import Plan

TEXT_THRESHOLD = 0.999  # the paper's appendix 6
SIZE = (520, 230)  # of a small chart


def analysis_view(redundancy: Redundancy, plan: Plan | None) -> dict[str, Any]:
    """Return the analysis of every stack; with a plan, what it chose is marked beside what was found."""
    stacks = [_stack(stack, StackEdits(plan, stack), redundancy.stream) for stack in redundancy.stacks]
    return {"held_out": redundancy.held_out, "few": redundancy.few, "stacks": stacks}


def _stack(stack: StackAnalysis, edits: StackEdits, stream: str) -> dict[str, Any]:
    leading = stack.curves(stream)
    chosen = {name: edits.intervals if curves is leading else [] for name, curves in stack.streams.items()}
    return {
        "name": stack.name,
        "count": len(stack.blocks),
        "edits": edits,
        "map": BlockMap(stack, leading.candidates, edits),
        "heatmaps": _heatmaps(stack, edits),
        "stream": next(name for name, curves in stack.streams.items() if curves is leading),
        "deltas": {
            name: [(one, _inside(chosen[name], one), _delta(stack, curves, one)) for one in curves.candidates]
            for name, curves in stack.streams.items()
        },
        "fits": _fits(stack),
        "text": _text(stack, edits),
        "ffns": _ffns(stack, edits),
    }


def _heatmaps(stack: StackAnalysis, edits: StackEdits) -> dict[str, Heatmap]:
    shown = {name: curves.similarity for name, curves in stack.streams.items() if curves.similarity}
    low, high = value_range(list(shown.values()))
    squares = edits.intervals
    return {name: Heatmap(matrix, low, high, name, stack.first, squares) for name, matrix in shown.items()}


def _delta(stack: StackAnalysis, curves: StreamCurves, interval: Interval) -> LineChart:
    start = interval.first - stack.first
    row = curves.delta[start]
    end = min(len(row), max(interval.last - stack.first + 5, start + 7))
    shown = [k for k in range(start + 1, end) if row[k] is not None]
    turn = interval.last - stack.first + 1
    walked, rest = [k for k in shown if k <= turn], [k for k in shown if k >= turn]
    name = f"Delta({interval.first}, k)"
    return LineChart(
        [
            Series("not needed", [stack.first + k for k in rest], [row[k] for k in rest], faint=True),
            Series(name, [stack.first + k for k in walked], [row[k] for k in walked], dots=True),
        ],
        f"Delta from block {interval.first}: the candidate ends at block {interval.last}",
        ("k", ""),
        (230, 150),
        band=(interval.first + 0.85, interval.last + 0.15),
    )


def _inside(chosen: Sequence[tuple[int, int]], candidate: Interval) -> str:
    """Return how much of a candidate was selected, in words; nothing where it was not."""
    parts = [(a, b) for a, b in chosen if a <= candidate.last and b >= candidate.first]
    if parts == [(candidate.first, candidate.last)]:
        return "selected"
    return "selected: " + ", ".join(f"{a}–{b}" for a, b in parts) if parts else ""


def _fits(stack: StackAnalysis) -> LineChart:
    series = [
        Series(f"{name} stream", _blocks(stack), curves.fit, colour, dots=True)
        for colour, (name, curves) in enumerate(stack.streams.items())
    ]
    return LineChart(series, "Probe residual of each block", ("block", "residual"), SIZE)


def _text(stack: StackAnalysis, edits: StackEdits) -> LineChart | None:
    values = [None if v is None or not math.isfinite(v) else max(1.0 - v, 1e-8) for v in stack.text_similarity]
    if all(value is None for value in values):
        return None
    lost = {b: v for b, v in zip(_blocks(stack), values, strict=True) if b in edits.textless}
    series = [Series("1 - CKA of the text stream", _blocks(stack), values, 2, dots=True)]
    if lost:
        series.append(Series("text stream replaced", list(lost), list(lost.values()), 1, line=False, dots=True))
    words, labels = "How much each block changes the text stream", ("block", "1 - CKA")
    return LineChart(series, words, labels, SIZE, log_y=True, rule=1 - TEXT_THRESHOLD)


def _ffns(stack: StackAnalysis, edits: StackEdits) -> LineChart | None:
    if not stack.ffn:
        return None
    groups = {
        f"{stream} FFN": [fit for fit in stack.ffn if fit.stream == stream]
        for stream in dict.fromkeys(fit.stream for fit in stack.ffn)
    }
    series = [
        Series(name, [f.block for f in fits], [f.error for f in fits], colour, dots=True)
        for colour, (name, fits) in enumerate(groups.items())
    ]
    replaced = {edit.block for edit in edits.ffn}
    if chosen := [fit for fit in stack.ffn if fit.block in replaced]:
        blocks, errors = [f.block for f in chosen], [f.error for f in chosen]
        series.append(Series("replaced", blocks, errors, 6, line=False, dots=True))
    return LineChart(series, "Error of an FFN's projector", ("block", "error"), SIZE)


def _blocks(stack: StackAnalysis) -> range:
    return range(stack.first, stack.last + 1)
