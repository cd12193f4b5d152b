"""The predicted damage of an edit: Eq. 6 between normed states, 0 to 4, weighted by the states' energy.

An error travels on in the residual stream as it is, and counts there by its size against the last state.
"""

from __future__ import annotations

from collections.abc import Iterable

from ppcl_fx.schema.analysis import Redundancy, StackAnalysis
from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, Plan, TextStreamEdit

LEARNED = 0.1
"""What training leaves of a student block's predicted damage.

A block learns what the chain of linear probes, by which its damage is predicted, cannot. A projector's damage is that
of its least-squares fit, which training hardly betters. On the `shapes` model students that were distilled for 400
steps kept 1 to 3 % of it in the output's squared error, projectors 5 to 170 %.
"""


def depth_damage(stack: StackAnalysis, span: tuple[int, int], stream: str) -> float:
    """Predicted damage of one student for blocks `span` (positions): Eq. 6 between surrogate and teacher at its end.

    The surrogate is the first block followed by linear probes. A student that starts from this block can imitate it,
    and then learns beyond (`LEARNED`). Weighted by the energy of the state. Only the deciding stream counts; at the
    stack's end, only if something reads it there.
    """
    first, last = span
    curves = stack.curves(stream)
    if last == len(stack.blocks) - 1 and not curves.live:
        return 0.0
    return LEARNED * (curves.gap[first][last] or 0.0) * curves.energy[last]


def ffn_damage(stack: StackAnalysis, position: int, *, text: bool = True) -> float | None:
    """Predicted damage of projectors for a block's feed-forwards; None where there is nothing to replace.

    ``2 - 2 similarity``, summed over streams: what Eq. 6 gives for vectors of that cosine, weighted by the energy.
    Without its text stream (`text` false) a block has no feed-forward there.
    """
    fits = [fit for fit in stack.ffn if fit.block == position + stack.first and (text or fit.stream != "text")]
    if not fits:
        return None
    return sum((2 - 2 * fit.similarity) * stack.streams[fit.stream].energy[position] for fit in fits)


def text_damage(stack: StackAnalysis, source: int, position: int) -> float:
    """Predicted damage of a block that takes its text state from block `source` (positions).

    Eq. 6 between what linear maps make of the source's text state and the teacher's, weighted by the energy.
    """
    text = stack.streams["text"]
    return (text.gap[source][position] or 0.0) * text.energy[position]


def may_lose_text(stack: StackAnalysis, position: int, least: float) -> bool:
    """Tell whether a block (a position) can lose its text stream, which it hardly changes: by a CKA of `least`."""
    similarity = stack.text_similarity[position]
    return similarity is not None and similarity >= least and stack.savings[position].text_last is not None


def removed_blocks(edits: Iterable[Edit], stack: str) -> set[int]:
    """Return the blocks of a list that depth edits remove; the first of each interval stands for them."""
    depth = [edit for edit in edits if isinstance(edit, DepthEdit) and edit.stack == stack]
    return {index for edit in depth for index in range(edit.first + 1, edit.last + 1)}


def span(edit: Edit) -> tuple[int, int]:
    """Return the first and the last block that an edit changes or reads from."""
    if isinstance(edit, FfnEdit):
        return edit.block, edit.block
    return edit.first if isinstance(edit, DepthEdit) else edit.source, edit.last


def predicted(analysis: Redundancy, plan: Plan, stream: str | None = None) -> Plan:
    """Return a plan with the damage that an analysis predicts for each edit; edits of other blocks have none.

    `stream` is the deciding stream, by default the one that the analysis was made with.
    """
    deciding = stream or analysis.stream
    return plan.model_copy(update={"edits": [_with_damage(analysis, plan, edit, deciding) for edit in plan.edits]})


def _with_damage(analysis: Redundancy, plan: Plan, edit: Edit, stream: str) -> Edit:
    damage: float | None = None
    for stack in (stack for stack in analysis.stacks if stack.path == edit.stack):
        inside = range(len(stack.blocks))
        first, last = (block - stack.first for block in span(edit))
        if first not in inside or last not in inside:
            continue
        if isinstance(edit, DepthEdit):
            damage = depth_damage(stack, (first, last), stream)
        elif isinstance(edit, FfnEdit):
            groups = [e for e in plan.edits if isinstance(e, TextStreamEdit) and e.stack == edit.stack]
            text = not any(group.source < edit.block <= group.last for group in groups)
            damage = ffn_damage(stack, first, text=text)
        elif "text" in stack.streams:
            gone = removed_blocks(plan.edits, edit.stack)
            lost = [i for i in range(first + 1, last + 1) if i + stack.first not in gone]
            damage = sum(text_damage(stack, first, block) for block in lost)
    return edit.model_copy(update={"damage": damage})
