"""A budget of time: an analysis whose sizes are times, by a file of what each block costs.

Time adds up over blocks as parameters do, so such an analysis goes through the same dynamic program. Times are counted
in whole nanoseconds, so sums are exact and do not depend on their order. What is not exact is the sum itself: a block
alone is timed, and a compiler or a GPU may overlap neighbours.
"""

from __future__ import annotations

from ppcl_fx.errors import PpclError, near
from ppcl_fx.schema.analysis import BlockSavings, Redundancy, StackAnalysis
from ppcl_fx.schema.costs import BlockCost, Costs, StackCost

TICKS = 10**6
"""Nanoseconds in a millisecond."""


def in_time(analysis: Redundancy, costs: Costs) -> Redundancy:
    """Return an analysis whose sizes are nanoseconds: of the teacher, of each block, and of what each edit saves.
    Raises `PpclError`: the costs are another model's, or lack a stack or a block.
    """
    if analysis.model and costs.model and analysis.model != costs.model:
        raise PpclError(
            f"the costs were measured on another model (fingerprint {costs.model[:12]}, the analysis is of "
            f"{analysis.model[:12]}); measure this one with python -m benchmarks.blocks"
        )
    found = {(stack.path, stack.first): stack for stack in costs.stacks}
    timed = [_stack_in_time(stack, found) for stack in analysis.stacks]
    for path, first in sorted(found.keys() - {(stack.path, stack.first) for stack in analysis.stacks}):
        raise PpclError(f"the costs have a stack at {path}.{first}, and the analysis has none there; measure again")
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
    return stack.model_copy(update={"block_params": [_ticks(b.whole) for b in cost.blocks], "savings": savings})


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
