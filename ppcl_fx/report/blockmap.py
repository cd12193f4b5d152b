"""A strip with one cell a block: candidates, what the plan replaces, and what is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ppcl_fx.schema.analysis import Interval, StackAnalysis
from ppcl_fx.schema.plan import DepthEdit, FfnEdit, Plan, TextStreamEdit


class StackEdits:
    """The edits of a plan that fall into one stack."""

    def __init__(self, plan: Plan | None, stack: StackAnalysis) -> None:
        inside = range(stack.first, stack.last + 1)
        edits = [] if plan is None else [edit for edit in plan.edits if edit.stack == stack.path]
        self.depth = [e for e in edits if isinstance(e, DepthEdit) and e.first in inside]
        self.ffn = [e for e in edits if isinstance(e, FfnEdit) and e.block in inside]
        self.text = [e for e in edits if isinstance(e, TextStreamEdit) and e.source in inside]

    @property
    def intervals(self) -> list[tuple[int, int]]:
        """The selected intervals as (first, last)."""
        return [(edit.first, edit.last) for edit in self.depth]

    @property
    def removed(self) -> set[int]:
        """The blocks that leave the model: all of an interval but the first."""
        return {block for edit in self.depth for block in range(edit.first + 1, edit.last + 1)}

    @property
    def textless(self) -> set[int]:
        """The blocks that stay and lose their text stream."""
        return {b for edit in self.text for b in range(edit.source + 1, edit.last + 1)} - self.removed

    def __bool__(self) -> bool:
        return bool(self.depth or self.ffn or self.text)


class Mark(NamedTuple):
    """What a row of the strip says of blocks `first` to `last`; `look` is "candidate", "stays" or a colour."""

    first: int
    last: int
    look: str
    words: str


class BlockMap:
    """The strip of one stack with its legend; the macro `block_map` draws it."""

    def __init__(self, stack: StackAnalysis, candidates: Sequence[Interval], edits: StackEdits) -> None:
        self.blocks = range(stack.first, stack.last + 1)
        self.cell = min(48.0, 860.0 / len(self.blocks))
        self.rows = _rows(self.blocks, candidates, edits)
        said = (f"{name}: {', '.join(map(_span, marks)) or 'none'}" for name, marks in self.rows)
        self.title = f"Blocks of {stack.name}: {'; '.join(said)}"
        keys = (
            (True, "candidate interval", 7),
            (edits.depth, "depth: one student block for the run", 0),
            (edits.ffn, "FFN: linear projector", 1),
            (edits.text, "text stream: linear projector", 2),
        )
        self.keys = [{"name": name, "colour": colour} for there, name, colour in keys if there]


def _rows(blocks: range, candidates: Sequence[Interval], edits: StackEdits) -> list[tuple[str, list[Mark]]]:
    words = "candidate {} to {}{}"
    more = [", open-ended" if c.open_ended else "" for c in candidates]
    spans = [(c.first, c.last) for c in candidates]
    found = [Mark(*span, "candidate", words.format(*span, end)) for span, end in zip(spans, more, strict=True)]
    rows = [("candidates", found)]
    if not edits:
        return rows
    rows.append(("depth", [Mark(a, b, "k0", f"blocks {a} to {b} become one") for a, b in edits.intervals]))
    if edits.ffn:
        rows.append(("FFN", [Mark(e.block, e.block, "k1", f"FFN of block {e.block}") for e in edits.ffn]))
    if edits.text:
        lost = [Mark(b, b, "k2", f"text stream of block {b}") for b in sorted(edits.textless)]
        rows.append(("text stream", lost))
    students = {edit.first for edit in edits.depth}
    left = [b for b in blocks if b not in edits.removed]
    kept = [
        Mark(b, b, "k0", f"block {b} is a student") if b in students else Mark(b, b, "stays", f"block {b} stays")
        for b in left
    ]
    return [*rows, (f"left: {len(left)} of {len(blocks)}", kept)]


def _span(mark: Mark) -> str:
    return str(mark.first) if mark.first == mark.last else f"{mark.first} to {mark.last}"
