"""The whole frontier: for every number of parameters the edits of least predicted damage, by dynamic programming.

A stack is walked from its first block to its last. At each block boundary the best ways of getting there are kept, of
each pair the one that saves no more and damages no less being dropped. What may come next is a block as it is, a block
whose feed-forwards are projectors, an interval that becomes one block, or a group that loses its text streams, with
blocks and whole intervals inside. Stacks are joined at the end. All numbers of parameters are exact, so the frontier
is: no set of such edits saves as much as one of its points and is predicted to do less damage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ppcl_fx.passes.selection.select import Options
from ppcl_fx.passes.selection.sensitivity import (
    depth_damage,
    ffn_damage,
    may_lose_text,
    predicted,
    text_damage,
)
from ppcl_fx.schema.analysis import Redundancy, StackAnalysis
from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, Plan, TextStreamEdit


@dataclass(frozen=True)
class Point:
    """One point of the frontier: the parameters that stay, the predicted damage, and the edits."""

    params: int
    damage: float
    edits: tuple[Edit, ...]


@dataclass(frozen=True)
class _Way:
    """A way through the blocks so far: what it saves and damages, its last step, and the way before it."""

    saved: int = 0
    damage: float = 0.0
    ffn: int = 0
    step: Edit | None = None
    before: tuple[_Way, ...] = ()

    def then(self, saved: int, damage: float, *, step: Edit | None = None, ffn: int = 0) -> _Way:
        """Return this way gone on."""
        return _Way(self.saved + saved, self.damage + damage, self.ffn + ffn, step, (self,))

    def edits(self) -> list[Edit]:
        """Return the steps, in order."""
        found: list[Edit] = []
        todo = [self]
        while todo:
            way = todo.pop()
            if way.step is not None:
                found.append(way.step)
            todo.extend(way.before)
        return found[::-1]


class _Piece(NamedTuple):
    """One or more blocks that a way takes at once: the last of them, what that saves and damages, and its edit."""

    last: int
    saved: int
    damage: float
    edit: Edit | None


def frontier(analysis: Redundancy, options: Options) -> list[Point]:
    """Return the frontier, from the whole teacher to the fewest parameters that edits can leave.

    Every interval of a stack may be chosen, whether a candidate of Algorithm 1 or not. The budget does not count.
    """
    ways = [_Way()]
    for stack in analysis.stacks:
        own = _stack_ways(stack, options)
        joined = (
            _Way(a.saved + b.saved, a.damage + b.damage, a.ffn + b.ffn, None, (b, a))
            for a in ways
            for b in own
            if a.ffn + b.ffn <= options.ffn
        )
        ways = _best(joined)
    points: list[Point] = []
    for way in ways:  # the most saved, and of those the least damage, first
        if not points or way.damage < points[-1].damage:
            # Depth first, as plans are written.
            edits = sorted(way.edits(), key=lambda edit: (not isinstance(edit, DepthEdit), isinstance(edit, FfnEdit)))
            plan = predicted(analysis, Plan(edits=edits), options.stream)
            points.append(Point(analysis.teacher_params - way.saved, way.damage, tuple(plan.edits)))
    return points[::-1]


def depth_edit(
    stack: StackAnalysis, span: tuple[int, int], init: Literal["first", "middle"], damage: float | None = None
) -> DepthEdit:
    """Return the edit that makes one block of some (positions in the stack)."""
    first, last = (position + stack.first for position in span)
    return DepthEdit(stack=stack.path, first=first, last=last, init=init, damage=damage)


def _stack_ways(stack: StackAnalysis, options: Options) -> list[_Way]:
    """Return the best ways through a whole stack."""
    count = len(stack.blocks)
    plain = [[*_pieces(stack, start, options, text=True)] for start in range(count)]
    bare = [[*_pieces(stack, start, options, text=False)] for start in range(count)]
    outside: list[list[_Way]] = [[] for _ in range(count + 1)]
    outside[0] = [_Way()]
    for start in range(count):
        here = outside[start] = _best(outside[start], options.ffn)
        for piece in plain[start]:
            outside[piece.last + 1] += _extended(here, piece)
        if options.width and start + 1 < count and may_lose_text(stack, start + 1, options.text_cka):
            _add_groups(stack, options, start, here, plain[start], bare, outside)
    return _best(outside[count], options.ffn)


def _add_groups(
    stack: StackAnalysis,
    options: Options,
    source: int,
    here: Sequence[_Way],
    plain: Sequence[_Piece],
    bare: Sequence[Sequence[_Piece]],
    outside: list[list[_Way]],
) -> None:
    """Add to `outside` what groups cost whose text state comes from block `source`."""
    count = len(stack.blocks)
    inside: list[list[_Way]] = [[] for _ in range(count + 1)]
    for piece in plain:
        if piece.last == source:  # a student or a block of an interval is no source
            inside[source + 1] += _extended(here, piece)
    for start in range(source + 1, count):
        if not inside[start]:
            continue
        ways = inside[start] = _best(inside[start], options.ffn)
        savings = stack.savings[start]
        harm = text_damage(stack, source, start)
        for piece in bare[start]:
            if not all(may_lose_text(stack, block, options.text_cka) for block in range(start, piece.last + 1)):
                continue
            inside[piece.last + 1] += _extended(ways, piece, savings.text or 0, harm)
            ending = _extended(ways, piece, savings.text_last or 0, harm)
            group = TextStreamEdit(stack=stack.path, source=source + stack.first, last=piece.last + stack.first)
            outside[piece.last + 1] += [way.then(0, 0.0, step=group) for way in ending]


def _pieces(stack: StackAnalysis, start: int, options: Options, *, text: bool) -> Iterator[_Piece]:
    """Give what may come at block `start` (a position in the stack), with its text stream or without."""
    yield _Piece(start, 0, 0.0, None)
    savings = stack.savings[start].ffn if text else stack.savings[start].ffn_without_text
    harm = ffn_damage(stack, start, text=text)
    if options.width and options.ffn > 0 and savings is not None and savings > 0 and harm is not None:
        yield _Piece(start, savings, harm, FfnEdit(stack=stack.path, block=start + stack.first))
    saved = 0
    for last in range(start + 1, len(stack.blocks)):
        saved += stack.block_params[last]
        span = (start, last)
        depth = depth_edit(stack, span, options.init)
        yield _Piece(last, saved, depth_damage(stack, span, options.stream), depth)


def _extended(ways: Iterable[_Way], piece: _Piece, saved: int = 0, damage: float = 0.0) -> list[_Way]:
    """Return ways gone on by a piece, which saves and damages this much more than alone."""
    ffn = int(isinstance(piece.edit, FfnEdit))
    return [way.then(piece.saved + saved, piece.damage + damage, step=piece.edit, ffn=ffn) for way in ways]


def _best(ways: Iterable[_Way], most_ffn: int | None = None) -> list[_Way]:
    """Return the ways of which none saves as much with as little damage and as few feed-forwards as another."""
    kept: list[_Way] = []
    fronts: dict[int, float] = {}
    ordered = sorted(ways, key=lambda way: (-way.saved, way.damage, way.ffn))
    for way in ordered:
        if most_ffn is not None and way.ffn > most_ffn:
            continue
        # Everything kept so far saves at least as much.
        if all(way.damage < damage for ffn, damage in fronts.items() if ffn <= way.ffn):
            fronts[way.ffn] = way.damage
            kept.append(way)
    return kept
