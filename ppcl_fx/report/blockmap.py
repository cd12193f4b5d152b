"""A strip with one cell a block: candidates, what the plan replaces, and what is left."""

from __future__ import annotations

from collections.abc import Sequence

from ppcl_fx.report.html import Html, tag
from ppcl_fx.report.svg import legend, picture
from ppcl_fx.schema.analysis import Interval, StackAnalysis
from ppcl_fx.schema.plan import DepthEdit, FfnEdit, Plan, TextStreamEdit

_LEFT, _ROW, _GAP = 132.0, 24.0, 8.0


class StackEdits:
    """The edits of a plan that fall into one stack."""

    def __init__(self, plan: Plan | None, stack: StackAnalysis) -> None:
        inside = range(stack.first, stack.first + len(stack.blocks))
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


def block_map(stack: StackAnalysis, candidates: Sequence[Interval], edits: StackEdits) -> Html:
    """Return the strip of one stack with its legend."""
    count = len(stack.blocks)
    cell = min(48.0, 860.0 / max(count, 1))
    rows = _rows(stack, candidates, edits)
    parts: list[Html] = []
    for index in range(count):
        x = _LEFT + index * cell
        if count <= 32 or index % 5 == 0:
            parts.append(tag("text", stack.first + index, x=x + cell / 2, y=11, text_anchor="middle"))
    y = 20.0
    for name, marks in rows:
        parts.append(tag("text", name, x=_LEFT - 12, y=y + 16, text_anchor="end"))
        parts += _marks(marks, stack.first, cell, y, count)
        y += _ROW + _GAP
    words = f"Blocks of {stack.name}: " + "; ".join(f"{name}: {_words(marks)}" for name, marks in rows)
    strip = picture(words, _LEFT + count * cell + 4, y, *parts, stretch=False)
    keys = [("candidate interval", 7)]
    keys += [("depth: one student block for the run", 0)] if edits.depth else []
    keys += [("FFN: linear projector", 1)] if edits.ffn else []
    keys += [("text stream: linear projector", 2)] if edits.text else []
    return tag("figure", strip, legend(keys), class_="strip")


Mark = tuple[int, int, int, bool, str]  # first block, last block, colour, filled, words


def _rows(
    stack: StackAnalysis, candidates: Sequence[Interval], edits: StackEdits
) -> list[tuple[str, list[Mark]]]:
    found = []
    for c in candidates:
        words = f"candidate {c.first} to {c.last}" + (", open-ended" if c.open_ended else "")
        found.append((c.first, c.last, 7, False, words))
    rows: list[tuple[str, list[Mark]]] = [("candidates", found)]
    if not edits:
        return rows
    chosen = [(e.first, e.last, 0, True, f"blocks {e.first} to {e.last} become one") for e in edits.depth]
    rows.append(("depth", chosen))
    if edits.ffn:
        rows.append(("FFN", [(e.block, e.block, 1, True, f"FFN of block {e.block}") for e in edits.ffn]))
    if edits.text:
        lost = [(b, b, 2, True, f"text stream of block {b}") for b in sorted(edits.textless)]
        rows.append(("text stream", lost))
    left = [b for b in range(stack.first, stack.first + len(stack.blocks)) if b not in edits.removed]
    kept: list[Mark] = [(b, b, -1, True, f"block {b} stays") for b in left]
    for edit in edits.depth:
        kept[left.index(edit.first)] = (edit.first, edit.first, 0, True, f"block {edit.first} is a student")
    rows.append((f"left: {len(left)} of {len(stack.blocks)}", kept))
    return rows


def _marks(marks: Sequence[Mark], first: int, cell: float, y: float, count: int) -> list[Html]:
    parts = [
        tag("rect", x=_LEFT + i * cell + 1, y=y, width=max(cell - 2, 1), height=_ROW, rx=3, class_="cell")
        for i in range(count)
    ]
    for begin, end, shade, filled, words in marks:
        x, width = _LEFT + (begin - first) * cell + 1, (end - begin + 1) * cell - 2
        style = _style(shade, filled)
        parts.append(tag("rect", tag("title", words), x=x, y=y, width=max(width, 1), height=_ROW, rx=3, **style))
        if end > begin and width > 34:
            class_ = "on" if filled else "strong"
            at = x + width / 2
            parts.append(tag("text", f"{begin}–{end}", x=at, y=y + 16, text_anchor="middle", class_=class_))
    return parts


def _style(shade: int, filled: bool) -> dict[str, str]:
    if shade < 0:
        return {"fill": "var(--soft)", "opacity": "0.55"}
    if filled:
        return {"class_": f"fill k{shade}"}
    return {"fill": "none", "stroke": f"var(--c{shade})", "stroke-width": "1.6"}


def _words(marks: Sequence[Mark]) -> str:
    return ", ".join(str(b) if b == e else f"{b} to {e}" for b, e, *_ in marks) or "none"
