"""Which feed-forwards and text streams go, by appendix 6: top FFN fits, alike text streams, deeper first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from ppcl_fx.passes.selection.savings import saved
from ppcl_fx.passes.selection.select import Options
from ppcl_fx.passes.selection.sensitivity import ffn_damage, may_lose_text, removed, text_damage
from ppcl_fx.schema.analysis import Redundancy, StackAnalysis
from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, TextStreamEdit


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
    gone = removed(depth, stack.path)
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
