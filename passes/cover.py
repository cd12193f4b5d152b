"""The cheapest disjoint intervals of one stack for each number of removed blocks: a small exact dynamic
program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ppcl_fx.redundancy import Interval

Span = tuple[int, int]
"""First and last block of an interval: positions in a stack, inclusive."""


@dataclass(frozen=True)
class Cover:
    """Disjoint intervals in order, and the sum of their damages."""

    spans: tuple[Span, ...] = ()
    damage: float = 0.0

    @property
    def removed(self) -> int:
        """Blocks removed: each interval keeps one."""
        return sum(last - first for first, last in self.spans)


def cheapest_covers(
    blocks: int, allowed: Callable[[Span], bool], damage: Callable[[Span], float]
) -> list[Cover | None]:
    """For each r the cover of least damage that removes exactly r of `blocks` blocks; None where there is
    none.

    Equal damages are settled towards the earlier intervals, so the answer is the same each time.
    """
    best: list[list[Cover | None]] = [[None] * blocks for _ in range(blocks + 1)]
    best[0][0] = Cover()
    for start in range(blocks):
        for removed, cover in enumerate(best[start]):
            if cover is None:
                continue
            _offer(best[start + 1], removed, cover)
            for last in range(start + 1, blocks):
                span = (start, last)
                if allowed(span):
                    longer = Cover((*cover.spans, span), cover.damage + damage(span))
                    _offer(best[last + 1], removed + last - start, longer)
    return best[blocks]


def _offer(row: list[Cover | None], removed: int, cover: Cover) -> None:
    held = row[removed]
    if held is None or (cover.damage, cover.spans) < (held.damage, held.spans):
        row[removed] = cover


def within(candidates: Sequence[Interval], first: int, merged: int) -> Callable[[Span], bool]:
    """Allow the intervals that lie inside the union of at most `merged` neighbouring candidates.

    `candidates` have indices in the ModuleList, of which `first` is the stack's first block.
    """
    unions = [
        (candidates[start].first - first, candidates[start + merged - 1].last - first)
        for start in range(len(candidates) - merged + 1)
        if all(candidates[i].last + 1 == candidates[i + 1].first for i in range(start, start + merged - 1))
    ]
    return lambda span: any(a <= span[0] and span[1] <= b for a, b in unions)
