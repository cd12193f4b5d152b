"""Similarity heatmaps (the paper's Fig. 5): one cell a pair of blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ppcl_fx.report.html import Html, tag
from ppcl_fx.report.svg import picture, short, ticks

Matrix = Sequence[Sequence[float | None]]

# Anchors of a scale whose lightness rises evenly, dark blue to pale yellow: it reads in grey too, and for
# eyes that do not tell red from green.
_ANCHORS = (
    (22, 24, 72), (38, 64, 128), (28, 108, 140), (40, 148, 128), (104, 186, 98), (186, 212, 84), (252, 236, 150),
)  # fmt: skip


def heatmap(
    matrix: Matrix,
    low: float,
    high: float,
    *,
    title: str,
    first: int = 0,
    squares: Sequence[tuple[int, int]] = (),
) -> Html:
    """Return a square heatmap of `matrix`, whose rows and columns are blocks counted from `first`.

    Colours run from `low` to `high`; None or NaN stays empty. `squares` outlines the intervals (first, last)
    on the diagonal.
    """
    count = len(matrix)
    side, left, top, bar = 400.0, 40.0, 6.0, 54.0
    cell = side / max(count, 1)
    cells = [
        _cell(value, low, high, (left + j * cell, top + i * cell, cell), (first + i, first + j))
        for i, row in enumerate(matrix)
        for j, value in enumerate(row)
        if value is not None and math.isfinite(value)
    ]
    parts = [tag("g", cells, class_="heat")]
    for begin, end in squares:
        x, y, edge = left + (begin - first) * cell, top + (begin - first) * cell, (end - begin + 1) * cell
        for stroke, width in (("#000", 3.4), ("#fff", 1.6)):
            line = {"fill": "none", "stroke": stroke, "stroke_width": width}
            parts.append(tag("rect", x=x, y=y, width=edge, height=edge, **line))
    for value in ticks(first, first + count - 1, 8, whole=True):
        at = (value - first + 0.5) * cell
        parts.append(tag("text", short(value), x=left + at, y=top + side + 15, text_anchor="middle"))
        parts.append(tag("text", short(value), x=left - 6, y=top + at + 4, text_anchor="end"))
    parts.append(tag("text", "block", x=left + side / 2, y=top + side + 31, text_anchor="middle"))
    parts.append(_scale(low, high, left + side + 12, top, side))
    return picture(title, left + side + bar + 10, top + side + 36, *parts)


def value_range(matrices: Sequence[Matrix]) -> tuple[float, float]:
    """Return one colour range for several matrices: from the smallest value, floored to a tenth, up to 1."""
    values = [v for m in matrices for row in m for v in row if v is not None and math.isfinite(v)]
    lowest = min(values, default=0.0)
    return (min(math.floor(lowest * 10) / 10, 0.9), max(1.0, max(values, default=1.0)))


def colour(share: float) -> str:
    """Return the colour at `share` (0..1) of the scale, as ``#rrggbb``."""
    at = min(max(share, 0.0), 1.0) * (len(_ANCHORS) - 1)
    index = min(int(at), len(_ANCHORS) - 2)
    below, above, part = _ANCHORS[index], _ANCHORS[index + 1], at - index
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(below, above, strict=True))


def _cell(
    value: float, low: float, high: float, box: tuple[float, float, float], pair: tuple[int, int]
) -> Html:
    x, y, edge = (round(number, 2) for number in box)
    words = tag("title", f"blocks {pair[0]} and {pair[1]}: {value:.4f}")
    return tag("rect", words, x=x, y=y, width=edge, height=edge, fill=colour((value - low) / (high - low)))


def _scale(low: float, high: float, x: float, top: float, side: float) -> Html:
    steps = 40
    edge = side / steps
    shades = [
        tag("rect", x=x, y=top + side - (i + 1) * edge, width=12, height=edge, fill=colour((i + 0.5) / steps))
        for i in range(steps)
    ]
    parts = []
    for value in ticks(low, high, 5):
        y = top + side * (1 - (value - low) / (high - low))
        parts.append(tag("text", short(value), x=x + 16, y=y + 4))
    return tag("g", tag("g", *shades, class_="heat"), *parts)
