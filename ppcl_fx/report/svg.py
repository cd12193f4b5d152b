"""Small charts as inline SVG, in the page's colours, light or dark; marks say their value on hover.

The macro `line_chart` draws them, no plotting library: such files carry fixed colours, and are many times larger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Series:
    """One line of a chart: `x` and `y` of equal length (None or NaN in `y` leaves a gap); eight colours."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: int = 0
    line: bool = True
    dots: bool = False
    faint: bool = False


@dataclass(frozen=True)
class LineChart:
    """A chart of some series, and where its numbers lie in pixels.

    A series without a finite value is not drawn; without any, the chart says so.

    `title` is what screen readers say, `labels` of x and y, `band` a shaded span of x, `rule` a dashed horizontal line;
    `whole_x` asks for ticks at integers only.
    """

    series: Sequence[Series]
    title: str
    labels: tuple[str, str]
    size: tuple[float, float] = (720, 250)
    log_y: bool = False
    y_range: tuple[float, float] | None = None
    band: tuple[float, float] | None = None
    rule: float | None = None
    whole_x: bool = True

    @property
    def margins(self) -> tuple[float, float, float, float]:
        return (8, 8, 36, 46) if self._narrow else (10, 10, 38, 62)  # top, right, bottom, left

    @cached_property
    def points(self) -> list[tuple[float, float]]:
        """All points that are drawn."""
        every = (point for one in self.series for point in zip(one.x, one.y, strict=True))
        return [(x, y) for x, y in every if y is not None and self._shown(y)]

    def x(self, value: float) -> float:
        """Return the horizontal position of `value` in pixels."""
        low, high = self._x_span
        _, right, _, left = self.margins
        return left + (value - low) / (high - low) * (self.size[0] - left - right)

    def y(self, value: float) -> float:
        """Return the vertical position of `value` in pixels."""
        low, high, at = (_log(v) if self.log_y else v for v in (*self._y_span, value))
        top, _, bottom, _ = self.margins
        return self.size[1] - bottom - (at - low) / (high - low) * (self.size[1] - top - bottom)

    @property
    def shaded(self) -> tuple[float, float]:
        """From where to where the band goes, in pixels."""
        assert self.band is not None
        low, high = self._x_span
        return self.x(max(self.band[0], low)), self.x(min(self.band[1], high))

    @property
    def x_ticks(self) -> list[float]:
        return ticks(*self._x_span, 5 if self._narrow else 12, self.whole_x)

    @property
    def y_ticks(self) -> list[float]:
        low, high = self._y_span
        if not self.log_y:
            return ticks(low, high, 4 if self._narrow else 5)
        powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
        if len(powers) >= 2:
            every = math.ceil(len(powers) / 6)
            return [10.0**p for p in powers if p % every == 0]
        fine = (m * 10.0**p for p in range(math.floor(math.log10(low)), powers.stop) for m in (1, 2, 5))
        return [value for value in fine if low <= value <= high]

    def runs(self, one: Series) -> list[list[tuple[float, float, str]]]:
        """Return the unbroken pieces of a series: its points in pixels, and what each says."""
        runs: list[list[tuple[float, float, str]]] = [[]]
        for x, y in zip(one.x, one.y, strict=True):
            if y is not None and self._shown(y):
                words = f"{one.name}: {x:.6g}, {y:.6g}"
                runs[-1].append((round(self.x(x), 1), round(self.y(y), 1), words))
            elif runs[-1]:
                runs.append([])
        return [run for run in runs if run]

    @property
    def _narrow(self) -> bool:
        return self.size[0] <= 300

    @cached_property
    def _x_span(self) -> tuple[float, float]:
        low, high = min(x for x, _ in self.points), max(x for x, _ in self.points)
        air = 0.015 * (high - low) or 0.5
        return low - air, high + air

    @cached_property
    def _y_span(self) -> tuple[float, float]:
        if self.y_range is not None:
            return self.y_range
        ys = [y for _, y in self.points] + ([self.rule] if self.rule is not None else [])
        low, high = min(ys), max(ys)
        if self.log_y:
            return low / 1.3, high * 1.3
        air = 0.06 * (high - low) or max(abs(high), 1e-6) * 0.1
        return low - air if low < 0 or low > air else 0.0, high + air

    def _shown(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self.log_y)


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


def _log(value: float) -> float:
    return math.log10(max(value, 1e-300))
