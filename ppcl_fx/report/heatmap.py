"""Similarity heatmaps (the paper's Fig. 5): one cell a pair of blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Matrix = Sequence[Sequence[float | None]]

# Anchors of a scale whose lightness rises evenly, dark blue to pale yellow: it reads in grey too, and for
# eyes that do not tell red from green.
_ANCHORS = (
    (22, 24, 72), (38, 64, 128), (28, 108, 140), (40, 148, 128), (104, 186, 98), (186, 212, 84), (252, 236, 150),
)  # fmt: skip


@dataclass(frozen=True)
class Heatmap:
    """A square heatmap of the `matrix` of a stream, whose rows and columns are blocks counted from `first`.

    Colours run from `low` to `high`; None or NaN stays empty. `squares` outlines the intervals (first, last)
    on the diagonal. The macro `heatmap` draws it.
    """

    matrix: Matrix
    low: float
    high: float
    stream: str
    first: int = 0
    squares: Sequence[tuple[int, int]] = ()
    side = 400.0

    @property
    def title(self) -> str:
        """What screen readers say."""
        words = f"CKA between the outputs of all pairs of blocks, {self.stream} stream"
        return f"{words}; neighbours {self.neighbours:.3f} on average"

    @property
    def neighbours(self) -> float:
        """The mean over the pairs of blocks that follow each other; 1 where there is none."""
        near = [value for i, row in enumerate(self.matrix[:-1]) if (value := row[i + 1]) is not None]
        return sum(near) / len(near) if near else 1.0

    @property
    def edge(self) -> float:
        """The pixels of a cell."""
        return self.side / max(len(self.matrix), 1)

    @property
    def cells(self) -> Iterator[tuple[int, int, float]]:
        """The row, the column and the value of each cell that has one."""
        for i, row in enumerate(self.matrix):
            for j, value in enumerate(row):
                if value is not None and math.isfinite(value):
                    yield i, j, value

    def share(self, value: float) -> float:
        """Return where a value lies on the scale, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)

    @staticmethod
    def shade(share: float) -> str:
        """Return the colour at `share` (0..1) of the scale, as ``#rrggbb``."""
        at = min(max(share, 0.0), 1.0) * (len(_ANCHORS) - 1)
        index = min(int(at), len(_ANCHORS) - 2)
        below, above, part = _ANCHORS[index], _ANCHORS[index + 1], at - index
        return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(below, above, strict=True))


def value_range(matrices: Sequence[Matrix]) -> tuple[float, float]:
    """Return one colour range for several matrices: from the smallest value, floored to a tenth, up to 1."""
    values = [v for m in matrices for row in m for v in row if v is not None and math.isfinite(v)]
    lowest = min(values, default=0.0)
    return (min(math.floor(lowest * 10) / 10, 0.9), max(1.0, max(values, default=1.0)))
