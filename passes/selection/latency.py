"""A budget of time: the frontier over milliseconds, from a file of what each block costs.

Time adds up over blocks as parameters do: what an edit saves is what its blocks cost less what it leaves of them. So
an analysis whose sizes are times goes through the same dynamic program. Times are counted in whole nanoseconds, so sums
are exact and do not depend on their order. What is not exact is the sum itself: a block alone is timed, and a compiler
or a GPU may overlap neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ppcl_fx.errors import PpclError, near
from ppcl_fx.passes.selection.frontier import frontier
from ppcl_fx.passes.selection.savings import saved
from ppcl_fx.passes.selection.select import Options
from ppcl_fx.schema.analysis import BlockSavings, Redundancy, StackAnalysis
from ppcl_fx.schema.costs import BlockCost, Costs, StackCost
from ppcl_fx.schema.plan import Edit

TICKS = 10**6
"""Nanoseconds in a millisecond."""


@dataclass(frozen=True)
class TimePoint:
    """One point of the frontier over time: milliseconds and parameters that stay, predicted damage, edits."""

    milliseconds: float
    params: int
    damage: float
    edits: tuple[Edit, ...]


def time_frontier(analysis: Redundancy, costs: Costs, options: Options) -> list[TimePoint]:
    """Return the frontier over time, from the whole teacher to the quickest model that edits can leave.

    No set of edits is as quick as one of its points and is predicted to do less damage.

    Args:
        analysis: what `analyze` found.
        costs: what each block costs.
        options: as for `frontier`.

    Raises:
        PpclError: the costs are another model's, or lack a stack or a block.
    """
    return [
        TimePoint(
            point.params / TICKS, analysis.teacher_params - saved(analysis, point.edits), point.damage, point.edits
        )
        for point in frontier(in_time(analysis, costs), options)
    ]


def milliseconds(analysis: Redundancy, costs: Costs, edits: Iterable[Edit]) -> float:
    """Return the milliseconds of a model with all `edits`, as the costs predict them.

    Raises:
        PpclError: the costs are another model's, or lack a stack or a block.
    """
    timed = in_time(analysis, costs)
    return (timed.teacher_params - saved(timed, edits)) / TICKS


def in_time(analysis: Redundancy, costs: Costs) -> Redundancy:
    """Return an analysis whose sizes are nanoseconds: of the teacher, of each block, and of what each edit saves.

    Raises:
        PpclError: the costs are another model's, or lack a stack or a block.
    """
    if analysis.model and costs.model and analysis.model != costs.model:
        raise PpclError(
            f"the costs were measured on another model (fingerprint {costs.model[:12]}, the analysis is of "
            f"{analysis.model[:12]}); measure this one with python -m benchmarks.blocks"
        )
    found = {(stack.path, stack.first): stack for stack in costs.stacks}
    timed = [_stack_in_time(stack, found) for stack in analysis.stacks]
    known = {(stack.path, stack.first) for stack in analysis.stacks}
    for stack in costs.stacks:
        if (stack.path, stack.first) not in known:
            raise PpclError(
                f"the costs have a stack at {stack.path}.{stack.first}, and the analysis has none there; measure again"
            )
    total = _ticks(costs.rest) + sum(size for stack in timed for size in stack.block_params)
    return analysis.model_copy(update={"stacks": timed, "teacher_params": total})


def _stack_in_time(stack: StackAnalysis, found: dict[tuple[str, int], StackCost]) -> StackAnalysis:
    cost = found.get((stack.path, stack.first))
    if cost is None:
        have = [f"{path}.{first}" for path, first in found]
        name = f"{stack.path}.{stack.first}"
        raise PpclError(
            f"the costs have no stack that begins at {name}{near(name, have)}; theirs begin at {', '.join(have)}; "
            "measure again"
        )
    if len(cost.blocks) != len(stack.blocks):
        missing = stack.first + min(len(cost.blocks), len(stack.blocks))
        raise PpclError(
            f"the costs have {len(cost.blocks)} blocks of stack {stack.name}, and the analysis {len(stack.blocks)}: "
            f"they differ at block {stack.path}.{missing}; measure again"
        )
    savings = [_savings(block, own) for block, own in zip(cost.blocks, stack.savings, strict=True)]
    return stack.model_copy(
        update={"block_params": [_ticks(block.whole) for block in cost.blocks], "savings": savings}
    )


def _savings(cost: BlockCost, possible: BlockSavings) -> BlockSavings:
    """Return the nanoseconds that edits save at a block: of those that are possible, those that were measured."""

    def spared(before: float | None, after: float | None, known: int | None) -> int | None:
        return None if before is None or after is None or known is None else _ticks(before) - _ticks(after)

    text_last = spared(cost.whole, cost.text_last, possible.text_last)
    text = spared(cost.whole, cost.text if cost.text is not None else cost.text_last, possible.text)
    return BlockSavings(
        ffn=spared(cost.whole, cost.ffn, possible.ffn),
        ffn_without_text=spared(cost.text_last, cost.text_last_ffn, possible.ffn_without_text),
        text=text if text_last is not None else None,
        text_last=text_last,
    )


def _ticks(time: float) -> int:
    return round(time * TICKS)
