"""The selection rules: "paper", "budget", and the control "uniform"."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ppcl_fx.errors import PpclError
from ppcl_fx.passes.edits.width_rules import width_edits
from ppcl_fx.passes.selection.frontier import frontier
from ppcl_fx.passes.selection.latency import TICKS, time_frontier
from ppcl_fx.passes.selection.savings import saved
from ppcl_fx.passes.selection.select import Choice, Options, rule
from ppcl_fx.passes.selection.sensitivity import depth_damage
from ppcl_fx.schema.analysis import Interval, Redundancy, StackAnalysis
from ppcl_fx.schema.costs import Costs
from ppcl_fx.schema.plan import DepthEdit, Edit

Span = tuple[int, int]
"""First and last block of an interval: positions in a stack, inclusive."""


@rule("paper")
def paper(analysis: Redundancy, options: Options) -> Choice:
    """Algorithm 1's candidates by least predicted damage, then the width edits of appendix 6.

    Candidates cover a stack back to back, so this rule picks sub-intervals of them, or of several neighbours
    merged: for each number of removed blocks the disjoint ones whose predicted damages sum to the least. Width
    edits go on the blocks that depth left alone, where that is predicted to do less damage than more depth; of
    width edits that are not needed the weakest are dropped again.
    """
    need = analysis.teacher_params - options.budget
    if need == 0:
        return Choice([], ["the budget is the whole teacher: nothing is replaced"])
    longest = max(1, *(len(stack.curves(options.stream).candidates) for stack in analysis.stacks))
    tried = [(_cheapest(analysis, options, need, merged), merged) for merged in range(1, longest + 1)]
    feasible = [(plan.damage, merged, plan) for plan, merged in tried if plan is not None]
    if feasible:
        _, merged, best = min(feasible, key=lambda entry: entry[:2])
        reasons = [*_explain_stacks(analysis, options, merged), *_explain_edits(analysis, best.edits)]
        return Choice(best.edits, reasons)
    raise PpclError(
        f"no plan keeps {options.budget:,} of {analysis.teacher_params:,} parameters: the candidate intervals of "
        f"stream {options.stream!r} save too little; ask for more parameters"
    )


@rule("budget")
def budget(analysis: Redundancy, options: Options) -> Choice:
    """The least predicted damage of all sets of edits that meet the budget: the point of the frontier."""
    if options.costs is not None:
        return _within_time(analysis, options, options.costs)
    points = frontier(analysis, options)
    fitting = [point for point in points if point.params <= options.budget]
    if not fitting:
        raise PpclError(
            f"no plan keeps {options.budget:,} of {analysis.teacher_params:,} parameters: the smallest keeps "
            f"{points[-1].params:,}; ask for more parameters"
        )
    chosen = fitting[0]
    lines = [f"the least predicted damage, {chosen.damage:.3g}, of all sets of edits within the budget"]
    place = points.index(chosen)
    for word, other in (("larger", place - 1), ("smaller", place + 1)):
        if 0 <= other < len(points):
            point = points[other]
            lines.append(f"the next {word} model: {point.params:,} parameters, predicted damage {point.damage:.3g}")
    return Choice(chosen.edits, [*lines, *_explain_edits(analysis, chosen.edits)])


def _within_time(analysis: Redundancy, options: Options, costs: Costs) -> Choice:
    """The least predicted damage of all sets of edits within a budget of time: the point of that frontier."""
    points = time_frontier(analysis, costs, options)
    fitting = [point for point in points if round(point.milliseconds * TICKS) <= round(options.milliseconds * TICKS)]
    if not fitting:
        raise PpclError(
            f"no plan runs in {options.milliseconds:.4g} of {costs.total:.4g} ms: the quickest takes "
            f"{points[-1].milliseconds:.4g} ms; ask for more time"
        )
    chosen = fitting[0]
    lines = [
        f"{chosen.milliseconds:.4g} ms are predicted to stay, from the measured costs of each block",
        f"the least predicted damage, {chosen.damage:.3g}, of all sets of edits within the budget",
    ]
    place = points.index(chosen)
    for word, other in (("slower", place - 1), ("quicker", place + 1)):
        if 0 <= other < len(points):
            point = points[other]
            lines.append(f"the next {word} model: {point.milliseconds:.4g} ms, predicted damage {point.damage:.3g}")
    return Choice(chosen.edits, [*lines, *_explain_edits(analysis, chosen.edits)])


@rule("uniform")
def uniform_blocks(analysis: Redundancy, options: Options) -> Choice:
    """Split each stack into runs of near-equal length and keep one block of each, the same share in every
    stack."""
    need = analysis.teacher_params - options.budget
    total = sum(len(stack.blocks) for stack in analysis.stacks)
    for removed in range(total + 1):
        edits = [edit for stack in analysis.stacks for edit in _even(stack, removed, total, options)]
        if saved(analysis, edits) >= need:
            count = sum(edit.last - edit.first for edit in edits)
            return Choice(
                edits,
                [f"{count} evenly spaced blocks of {total} are removed; nothing about them was looked at"],
            )
    raise PpclError(
        f"no uniform plan keeps {options.budget:,} of {analysis.teacher_params:,} parameters: one block of each "
        "stack has to stay; ask for more parameters"
    )


@dataclass(frozen=True)
class _Candidate:
    edits: Sequence[Edit]
    damage: float


def _cheapest(analysis: Redundancy, options: Options, need: int, merged: int) -> _Candidate | None:
    """The plan of least predicted damage that meets the budget, depth and its width edits together."""
    found: _Candidate | None = None
    for covers in itertools.product(*(_covers(stack, options, merged) for stack in analysis.stacks)):
        if found is not None and sum(cover.damage for cover in covers) >= found.damage:
            continue
        depth = [
            edit
            for stack, cover in zip(analysis.stacks, covers, strict=True)
            for edit in depth_edits(stack, cover.spans, options)
        ]
        width = width_edits(analysis, depth, options, need) if options.width else []
        edits = [*depth, *width]
        damage = sum(edit.damage or 0.0 for edit in edits)
        if saved(analysis, edits) >= need and (found is None or damage < found.damage):
            found = _Candidate(edits, damage)
    return found


def _covers(stack: StackAnalysis, options: Options, merged: int) -> list[Cover]:
    candidates = stack.curves(options.stream).candidates
    reach = min(merged, max(1, len(candidates)))
    allowed = within(candidates, stack.first, reach)
    covers = cheapest_covers(len(stack.blocks), allowed, lambda span: depth_damage(stack, span, options.stream))
    return [cover for cover in covers if cover is not None]


def depth_edits(stack: StackAnalysis, spans: Sequence[Span], options: Options) -> list[DepthEdit]:
    """Depth edits for the intervals `spans` (positions in the stack), with their predicted damage."""
    return [
        DepthEdit(
            stack=stack.path,
            first=first + stack.first,
            last=last + stack.first,
            init=options.init,
            damage=depth_damage(stack, (first, last), options.stream),
        )
        for first, last in spans
    ]


def _even(stack: StackAnalysis, removed: int, total: int, options: Options) -> list[DepthEdit]:
    """Depth edits that cut the stack into runs of near-equal length, removing its share of `removed` blocks
    of `total`."""
    blocks = len(stack.blocks)
    runs = max(1, blocks - -(-removed * blocks // total))
    bounds = [run * blocks // runs for run in range(runs + 1)]
    spans = [(start, stop - 1) for start, stop in itertools.pairwise(bounds) if stop - start > 1]
    return depth_edits(stack, spans, options)


def _explain_stacks(analysis: Redundancy, options: Options, merged: int) -> list[str]:
    lines = []
    for stack in analysis.stacks:
        candidates = stack.curves(options.stream).candidates
        listed = " ".join(f"[{c.first}, {c.last}]{'+' if c.open_ended else ''}" for c in candidates) or "none"
        lines.append(f"stack {stack.name}: candidate intervals {listed} (+: Delta never rises)")
    if merged > 1:
        lines.append(
            f"up to {merged} neighbouring candidates were merged: that is predicted to do less damage"
        )
    return lines


def _explain_edits(analysis: Redundancy, edits: Sequence[Edit]) -> list[str]:
    lines = []
    for position, edit in enumerate(edits):
        saves = saved(analysis, edits[: position + 1]) - saved(analysis, edits[:position])
        damage = "unknown" if edit.damage is None else f"{edit.damage:.3g}"
        lines.append(f"{edit.id}: saves {saves:,} parameters, predicted damage {damage}")
    return lines


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
