"""Small charts as inline SVG, in the page's colours, light or dark; marks say their value on hover.

Written by hand and not by a plotting library: such files carry fixed colours, and are many times larger.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ppcl_fx.report.html import Html, number, tag

COLOURS = 8  # as many as the style sheet names: k0 .. k7


@dataclass(frozen=True)
class Series:
    """One line of a chart: `x` and `y` of equal length (None or NaN in `y` leaves a gap), `colour` 0..7."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: int = 0
    line: bool = True
    dots: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Frame:
    """Where a chart's numbers lie on the paper: pixel sizes, value ranges, and whether y is logarithmic."""

    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log_y: bool = False
    margins: tuple[float, float, float, float] = (10, 10, 38, 62)  # top right bottom left

    def x(self, value: float) -> float:
        """Return the horizontal position of `value` in pixels."""
        low, high = self.x_range
        _, right, _, left = self.margins
        return left + (value - low) / (high - low) * (self.width - left - right)

    def y(self, value: float) -> float:
        """Return the vertical position of `value` in pixels."""
        low, high = (_log(v) for v in self.y_range) if self.log_y else self.y_range
        share = ((_log(value) if self.log_y else value) - low) / (high - low)
        top, _, bottom, _ = self.margins
        return self.height - bottom - share * (self.height - top - bottom)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    size: tuple[float, float] = (720, 250),
    log_y: bool = False,
    y_range: tuple[float, float] | None = None,
    bands: Sequence[tuple[float, float]] = (),
    rule: float | None = None,
    whole_x: bool = True,
) -> Html:
    """Return a chart of the series, read out by screen readers as `title`.

    `bands` are shaded spans of x, `rule` a dashed horizontal line, `whole_x` asks for ticks at integers only.
    A series without a finite value is not drawn; without any, the chart says so.
    """
    points = [(x, y) for s in series for x, y in zip(s.x, s.y, strict=True) if _shown(y, log_y)]
    if not points:
        return tag("p", "Nothing to plot: there is no finite value.", class_="note")
    ys = [y for _, y in points if y is not None] + ([rule] if rule is not None else [])
    xs = [x for x, _ in points]
    margins = (10.0, 10.0, 38.0, 62.0) if size[0] > 300 else (8.0, 8.0, 36.0, 46.0)
    frame = Frame(*size, _wide(min(xs), max(xs)), y_range or _span(min(ys), max(ys), log_y), log_y, margins)
    parts: list[Html] = [_band(frame, *band) for band in bands]
    parts += _axes(frame, x_label, y_label, whole_x)
    if rule is not None:
        left, right = frame.x(frame.x_range[0]), frame.x(frame.x_range[1])
        parts.append(tag("line", x1=left, x2=right, y1=frame.y(rule), y2=frame.y(rule), class_="rule"))
    for one in series:
        parts += _draw(frame, one)
    return picture(title, *size, *parts)


def picture(title: str, width: float, height: float, *parts: Html, stretch: bool = True) -> Html:
    """Return an ``<svg>`` of the given size in user units, with `title` as its text alternative.

    It fills the width that there is; without `stretch`, at most its own.
    """
    box = f"0 0 {number(width)} {number(height)}"
    own = None if stretch else f"max-width: {number(width)}px"
    return tag("svg", tag("title", title), *parts, viewBox=box, role="img", aria_label=title, style=own)


def legend(series: Sequence[tuple[str, int]]) -> Html:
    """Return a list of (name, colour) pairs with a dash of the colour before each name."""
    return tag("ul", [tag("li", tag("i", class_=f"k{c % COLOURS}"), n) for n, c in series], class_="legend")


def figure(drawn: Html, words: str, series: Sequence[Series] = (), title: str = "") -> Html:
    """Return a drawing with a heading above it if there is one, and the names of its series and words below."""
    keys = legend([(one.name, one.colour) for one in series]) if series else None
    return tag("figure", tag("h3", title) if title else None, drawn, keys, tag("figcaption", words))


def ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """Return about `count` round numbers within [low, high]; `whole` keeps them integers."""
    if high <= low:
        return [low]
    raw = (high - low) / max(count, 1)
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * (1 - 1e-9))
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def short(value: float) -> str:
    """Return a tick's label: few digits, and powers of ten where the number is small or large."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}"


def _axes(frame: Frame, x_label: str, y_label: str, whole_x: bool) -> list[Html]:
    top, right, bottom, left = frame.margins
    narrow = frame.width <= 300
    parts: list[Html] = []
    for value in _y_ticks(frame, 4 if narrow else 5):
        y = frame.y(value)
        parts.append(tag("line", x1=left, x2=frame.width - right, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", short(value), x=left - 6, y=y + 4, text_anchor="end"))
    base = frame.height - bottom
    parts.append(tag("line", x1=left, x2=frame.width - right, y1=base, y2=base, class_="axis"))
    for value in ticks(*frame.x_range, 5 if narrow else 12, whole_x):
        parts.append(tag("text", short(value), x=frame.x(value), y=base + 15, text_anchor="middle"))
    middle = (left + frame.width - right) / 2
    parts.append(tag("text", x_label, x=middle, y=frame.height - 3, text_anchor="middle"))
    if y_label:
        half = (top + base) / 2
        turned = f"rotate(-90 11 {number(half)})"
        parts.append(tag("text", y_label, x=11, y=half, text_anchor="middle", transform=turned))
    return parts


def _y_ticks(frame: Frame, count: int) -> list[float]:
    low, high = frame.y_range
    if not frame.log_y:
        return ticks(low, high, count)
    powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    if len(powers) >= 2:
        every = math.ceil(len(powers) / 6)
        return [10.0**p for p in powers if p % every == 0]
    fine = (m * 10.0**p for p in range(math.floor(math.log10(low)), powers.stop) for m in (1, 2, 5))
    return [value for value in fine if low <= value <= high]


def _draw(frame: Frame, one: Series) -> list[Html]:
    shade = f"k{one.colour % COLOURS}" + (" faint" if one.faint else "")
    parts: list[Html] = []
    runs = _runs(frame, one)
    for run in runs if one.line else []:
        points = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in run)
        parts.append(tag("polyline", tag("title", one.name), points=points, class_=f"series {shade}"))
    for x, y in itertools.chain.from_iterable(runs) if one.dots else []:
        words = f"{one.name}: {number(float(x))}, {y:.6g}"
        at = {"cx": round(frame.x(x), 1), "cy": round(frame.y(y), 1)}
        parts.append(tag("circle", tag("title", words), **at, r=3, class_=f"fill {shade}"))
    return parts


def _runs(frame: Frame, one: Series) -> list[list[tuple[float, float]]]:
    """Return the unbroken pieces of a series."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(one.x, one.y, strict=True):
        if y is not None and _shown(y, frame.log_y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _band(frame: Frame, first: float, last: float) -> Html:
    low, high = frame.x_range
    left, right = frame.x(max(first, low)), frame.x(min(last, high))
    top, _, bottom, _ = frame.margins
    return tag("rect", x=left, y=top, width=right - left, height=frame.height - top - bottom, class_="band")


def _shown(value: float | None, log: bool) -> bool:
    return value is not None and math.isfinite(value) and (value > 0 or not log)


def _wide(low: float, high: float) -> tuple[float, float]:
    air = 0.015 * (high - low)
    return (low - air, high + air) if high > low else (low - 0.5, high + 0.5)


def _span(low: float, high: float, log: bool) -> tuple[float, float]:
    """Return a range with some air around the values."""
    if log:
        return (low / 1.3, high * 1.3)
    air = 0.06 * (high - low) or max(abs(high), 1e-6) * 0.1
    return (low - air if low < 0 or low > air else 0.0, high + air)


def _log(value: float) -> float:
    return math.log10(max(value, 1e-300))
