"""The selection rules: "paper", "budget", and the control "uniform"."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ppcl_fx.errors import PpclError
from ppcl_fx.passes.selection.frontier import Point, depth_edit, frontier
from ppcl_fx.passes.selection.latency import TICKS, in_time
from ppcl_fx.passes.selection.savings import saved
from ppcl_fx.passes.selection.select import Choice, Options, rule
from ppcl_fx.passes.selection.sensitivity import (
    depth_damage,
    ffn_damage,
    may_lose_text,
    removed_blocks,
    text_damage,
)
from ppcl_fx.schema.analysis import Interval, Redundancy, StackAnalysis
from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, TextStreamEdit

Span = tuple[int, int]
"""First and last block of an interval: positions in a stack, inclusive."""


@rule("paper")
def paper(analysis: Redundancy, options: Options) -> Choice:
    """Algorithm 1's candidates by least predicted damage, then the width edits of appendix 6.

    Candidates cover a stack back to back, so this rule picks sub-intervals of them, or of several neighbours merged:
    for each number of removed blocks the disjoint ones whose predicted damages sum to the least. Width edits go on the
    blocks that depth left alone, where that is predicted to do less damage than more depth; of width edits that are not
    needed the weakest are dropped again.
    """
    need = analysis.teacher_params - options.budget
    if need == 0:
        return Choice([], ["the budget is the whole teacher: nothing is replaced"])
    longest = max(1, *(len(stack.curves(options.stream).candidates) for stack in analysis.stacks))
    tried = {merged: _cheapest(analysis, options, need, merged) for merged in range(1, longest + 1)}
    feasible = [(plan[0], merged, plan[1]) for merged, plan in tried.items() if plan is not None]
    if not feasible:
        raise PpclError(
            f"no plan keeps {options.budget:,} of {analysis.teacher_params:,} parameters: the candidate intervals of "
            f"stream {options.stream!r} save too little; ask for more parameters"
        )
    _, merged, best = min(feasible, key=lambda entry: entry[:2])
    return Choice(best, [*_explain_stacks(analysis, options, merged), *_explain_edits(analysis, best)])


@rule("budget")
def budget(analysis: Redundancy, options: Options) -> Choice:
    """The least predicted damage of all sets of edits within the budget of size or of time: a point of the frontier."""
    costs, lines = options.costs, []
    points = frontier(analysis if costs is None else in_time(analysis, costs), options)
    most = options.budget if costs is None else round(options.milliseconds * TICKS)

    def amount(point: Point) -> str:
        return f"{point.params:,} parameters" if costs is None else f"{point.params / TICKS:.4g} ms"

    chosen = next((point for point in points if point.params <= most), None)
    if chosen is None:
        least = points[-1]
        raise PpclError(
            f"no plan keeps {options.budget:,} of {analysis.teacher_params:,} parameters: the smallest keeps "
            f"{least.params:,}; ask for more parameters"
            if costs is None
            else f"no plan runs in {options.milliseconds:.4g} of {costs.total:.4g} ms: the quickest takes "
            f"{amount(least)}; ask for more time"
        )
    if costs is not None:
        lines.append(f"{amount(chosen)} are predicted to stay, from the measured costs of each block")
    lines.append(f"the least predicted damage, {chosen.damage:.3g}, of all sets of edits within the budget")
    place = points.index(chosen)
    words = ("larger", "smaller") if costs is None else ("slower", "quicker")
    for word, others in zip(words, (points[:place][-1:], points[place + 1 :][:1]), strict=True):
        lines += [f"the next {word} model: {amount(p)}, predicted damage {p.damage:.3g}" for p in others]
    return Choice(chosen.edits, [*lines, *_explain_edits(analysis, chosen.edits)])


@rule("uniform")
def uniform_blocks(analysis: Redundancy, options: Options) -> Choice:
    """Split each stack into runs of near-equal length and keep one block of each, the same share in every stack."""
    need = analysis.teacher_params - options.budget
    total = sum(len(stack.blocks) for stack in analysis.stacks)
    for removed in range(total + 1):
        edits = [edit for stack in analysis.stacks for edit in _even(stack, removed, total, options)]
        if saved(analysis, edits) >= need:
            count = sum(edit.last - edit.first for edit in edits)
            why = f"{count} evenly spaced blocks of {total} are removed; nothing about them was looked at"
            return Choice(edits, [why])
    raise PpclError(
        f"no uniform plan keeps {options.budget:,} of {analysis.teacher_params:,} parameters: one block of each "
        "stack has to stay; ask for more parameters"
    )


def _cheapest(analysis: Redundancy, options: Options, need: int, merged: int) -> tuple[float, list[Edit]] | None:
    """The plan of least predicted damage that meets the budget, depth and its width edits together, and its damage."""
    found: tuple[float, list[Edit]] | None = None
    for covers in itertools.product(*(_covers(stack, options, merged) for stack in analysis.stacks)):
        if found is not None and sum(cover.damage for cover in covers) >= found[0]:
            continue
        pairs = zip(analysis.stacks, covers, strict=True)
        depth = [edit for stack, cover in pairs for edit in depth_edits(stack, cover.spans, options)]
        edits: list[Edit] = [*depth, *(width_edits(analysis, depth, options, need) if options.width else [])]
        damage = sum(edit.damage or 0.0 for edit in edits)
        if saved(analysis, edits) >= need and (found is None or damage < found[0]):
            found = damage, edits
    return found


def _covers(stack: StackAnalysis, options: Options, merged: int) -> list[Cover]:
    candidates = stack.curves(options.stream).candidates
    reach = min(merged, max(1, len(candidates)))
    allowed = within(candidates, stack.first, reach)
    covers = cheapest_covers(len(stack.blocks), allowed, lambda span: depth_damage(stack, span, options.stream))
    return [cover for cover in covers if cover is not None]


def depth_edits(stack: StackAnalysis, spans: Sequence[Span], options: Options) -> list[DepthEdit]:
    """Depth edits for the intervals `spans` (positions in the stack), with their predicted damage."""
    return [depth_edit(stack, span, options.init, depth_damage(stack, span, options.stream)) for span in spans]


def _even(stack: StackAnalysis, removed: int, total: int, options: Options) -> list[DepthEdit]:
    """Depth edits that cut a stack into runs of near-equal length, removing its share of `removed` of `total`."""
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
        lines.append(f"up to {merged} neighbouring candidates were merged: that is predicted to do less damage")
    return lines


def _explain_edits(analysis: Redundancy, edits: Sequence[Edit]) -> list[str]:
    lines = []
    for position, edit in enumerate(edits):
        saves = saved(analysis, edits[: position + 1]) - saved(analysis, edits[:position])
        damage = "unknown" if edit.damage is None else f"{edit.damage:.3g}"
        lines.append(f"{edit.id}: saves {saves:,} parameters, predicted damage {damage}")
    return lines


class Cover(NamedTuple):
    """Disjoint intervals in order, and the sum of their damages. Each interval keeps one block."""

    damage: float = 0.0
    spans: tuple[Span, ...] = ()


def cheapest_covers(
    blocks: int, allowed: Callable[[Span], bool], damage: Callable[[Span], float]
) -> list[Cover | None]:
    """For each r the cover of least damage that removes exactly r of `blocks` blocks; None where there is none.

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
                    longer = Cover(cover.damage + damage(span), (*cover.spans, span))
                    _offer(best[last + 1], removed + last - start, longer)
    return best[blocks]


def _offer(row: list[Cover | None], removed: int, cover: Cover) -> None:
    row[removed] = min(row[removed] or cover, cover)


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


# ---- width edits, by appendix 6: top FFN fits, alike text streams, deeper first ------------------------------------


def width_edits(analysis: Redundancy, depth: Sequence[DepthEdit], options: Options, need: int) -> list[Edit]:
    """Width edits on what `depth` leaves, as many as it takes to save `need` parameters together with it.

    Raises nothing: where all of them save too little, all of them are returned.
    """
    text = text_edits(analysis, depth, options)
    ffn = ffn_edits(analysis, depth, options)
    if saved(analysis, [*depth, *ffn, *text]) < need:
        return [*ffn, *text]
    return _trimmed(analysis, depth, ffn, text, need)


def ffn_edits(analysis: Redundancy, depth: Sequence[DepthEdit], options: Options) -> list[FfnEdit]:
    """The `options.ffn` blocks outside of every interval whose projected outputs are most similar, best first.

    A block's similarity is the least of its streams'.
    """
    ranked = []
    for stack in analysis.stacks:
        for position, savings in enumerate(stack.savings):
            index = position + stack.first
            fits = [fit.similarity for fit in stack.ffn if fit.block == index]
            if savings.ffn is not None and savings.ffn > 0 and fits and not _inside(depth, stack.path, index):
                ranked.append((-min(fits), stack.path, index, ffn_damage(stack, position)))
    best = sorted(ranked)[: options.ffn]
    return [FfnEdit(stack=path, block=index, damage=damage) for _, path, index, damage in best]


def text_edits(analysis: Redundancy, depth: Sequence[DepthEdit], options: Options) -> list[TextStreamEdit]:
    """Groups of blocks whose text state hardly changes (CKA at least `options.text_cka`), deepest group first.

    A group takes its text state from the block before it, which must have survived depth, and it holds whole intervals
    only.
    """
    groups = [group for stack in analysis.stacks for group in _groups(stack, depth, options.text_cka)]
    return sorted(groups, key=lambda edit: (-edit.last, edit.stack))


def _groups(stack: StackAnalysis, depth: Sequence[DepthEdit], least: float) -> Iterator[TextStreamEdit]:
    spans = sorted((edit.first, edit.last) for edit in depth if edit.stack == stack.path)
    for source, last in _runs(stack, least):
        # A student stands for its whole interval: no group takes its text state from inside, or ends inside.
        for u, v in spans:
            source = v + 1 if u <= source <= v else source
        last = next((u - 1 for u, v in spans if u <= last < v), last)
        edit = _group(stack, depth, source, last)
        if edit is not None:
            yield edit


def _runs(stack: StackAnalysis, least: float) -> Iterator[tuple[int, int]]:
    """Maximal ``(source, last)`` of ModuleList indices: each block after the source, up to the last, may go."""
    positions = range(1, len(stack.blocks))
    for alike, run in itertools.groupby(positions, lambda position: may_lose_text(stack, position, least)):
        if alike:
            inside = [position + stack.first for position in run]
            yield inside[0] - 1, inside[-1]


def _group(stack: StackAnalysis, depth: Sequence[DepthEdit], source: int, last: int) -> TextStreamEdit | None:
    """The edit for blocks (source, last], with its predicted damage; None where no block is left in it."""
    gone = removed_blocks(depth, stack.path)
    lost = [index for index in range(source + 1, last + 1) if index not in gone]
    if not lost:
        return None
    damage = sum(text_damage(stack, source - stack.first, index - stack.first) for index in lost)
    return TextStreamEdit(stack=stack.path, source=source, last=last, damage=damage)


def _shorter(analysis: Redundancy, depth: Sequence[DepthEdit], edit: TextStreamEdit) -> TextStreamEdit | None:
    """The same group with a deeper source, which stays dual-stream: deeper blocks go first. None if there is none."""
    stack = next(s for s in analysis.stacks if s.path == edit.stack and s.first <= edit.source <= s.last)
    outside = (i for i in range(edit.source + 1, edit.last) if not _inside(depth, stack.path, i))
    source = next(outside, None)
    return None if source is None else _group(stack, depth, source, edit.last)


def _trimmed(
    analysis: Redundancy, depth: Sequence[DepthEdit], ffn: list[FfnEdit], text: list[TextStreamEdit], need: int
) -> list[Edit]:
    """Drop width edits, the weakest first, for as long as the rest still saves `need`."""
    while ffn and saved(analysis, [*depth, *ffn[:-1], *text]) >= need:
        ffn = ffn[:-1]
    while text:
        shorter = _shorter(analysis, depth, text[-1])
        fewer = [*text[:-1], shorter] if shorter else text[:-1]
        if saved(analysis, [*depth, *ffn, *fewer]) < need:
            break
        text = fewer
    return [*ffn, *text]


def _inside(depth: Sequence[DepthEdit], path: str, index: int) -> bool:
    return any(edit.stack == path and edit.first <= index <= edit.last for edit in depth)
