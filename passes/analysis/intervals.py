"""From CKA curves to candidate intervals: Delta (Eq. 4), its first rise (Eq. 5), Algorithm 1.

Positions count from 0 in the stack. `cka[u][k]` is None below the diagonal, and where no sample defines the number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import GraphModule

from ppcl_fx.errors import PpclError
from ppcl_fx.ir.meta import node_info
from ppcl_fx.ir.stacks import stacks
from ppcl_fx.passes.contract import Pass, Result
from ppcl_fx.schema.analysis import Interval, Matrix


def first_difference(cka: Matrix) -> Matrix:
    """``Delta(u, k) = cka(u, k-1) - cka(u, k)`` for k > u (Eq. 4); None elsewhere. ``cka(u, u)`` is 1."""

    def change(u: int, k: int) -> float | None:
        now, before = cka[u][k], cka[u][k - 1]
        return before - now if k > u and now is not None and before is not None else None

    return [[change(u, k) for k in range(len(cka))] for u in range(len(cka))]


def interval_end(row: Sequence[float | None], start: int) -> tuple[int, bool]:
    """The end v of the interval from `start` on, given its row ``Delta(start, k)``, and whether it is open-ended.

    Eq. 5: ``v = min {k - 1 | k >= start + 2, Delta(start, k) > Delta(start, k-1)}``. Where Delta never rises the
    interval runs to the end of the stack, which the paper leaves open.
    """
    for k in range(start + 2, len(row)):
        now, before = row[k], row[k - 1]
        if now is None or before is None:
            raise PpclError(f"Delta({start}, {k}) is undefined: no sample of this stream has two different tokens")
        if now > before:
            return k - 1, False
    return len(row) - 1, True


def algorithm_1(delta: Matrix, start: int = 0) -> list[Interval]:
    """Candidate intervals of one stack, back to back from position `start` (Algorithm 1, stage 1.2).

    A last block that is left over alone makes no interval. A stream whose curves are undefined has no candidates.
    """
    found: list[Interval] = []
    u, size = start, len(delta)
    while u < size - 1:
        if delta[u][u + 1] is None:
            return []
        v, open_ended = interval_end(delta[u], u)
        found.append(Interval(first=u, last=v, open_ended=open_ended))
        u = v + 1
    return found


def shifted(intervals: Sequence[Interval], first: int) -> list[Interval]:
    """The same intervals with positions in a stack turned into indices in a ModuleList (`first`: the stack's first)."""
    return [Interval(first=i.first + first, last=i.last + first, open_ended=i.open_ended) for i in intervals]


@dataclass(frozen=True)
class CandidateIntervals(Pass, name="candidate-intervals", kind="analysis", numerics="exact"):
    """Run Algorithm 1 on the curves that `Similarity` left on the graph, for every stack and stream by itself.

    Annotates ``node.meta["ppcl"]["candidate"]`` of the output nodes inside a candidate with its `Interval` (indices in
    the ModuleList).
    """

    def requires(self, gm: GraphModule) -> None:
        """Raises `PpclError` where a block's output has no curve yet."""
        for stack in stacks(gm):
            for block in stack.blocks:
                for stream, node in block.outputs.items():
                    if "delta" not in node_info(node):
                        raise PpclError(f"{block.path}: the {stream} output has no CKA curve; run Similarity first")

    def apply(self, gm: GraphModule) -> Result:
        for stack in stacks(gm):
            for stream in stack.streams:
                nodes = [block.outputs[stream] for block in stack.blocks if stream in block.outputs]
                delta: Matrix = [node_info(node)["delta"] for node in nodes]
                for interval in algorithm_1(delta):
                    named = shifted([interval], stack.blocks[0].index)[0]
                    for position in range(interval.first, interval.last + 1):
                        node_info(nodes[position])["candidate"] = named
        return Result(gm, modified=False)
