"""The coverage table: one row for each class, measured, and the page that is generated from the rows.

Run ``python -m tests.coverage.table --write`` to measure all rows and write ``docs/coverage.md``. Most of the time goes
into the columns of the types, which export every model; with ``--keep-types`` they stay as they are.
"""

from __future__ import annotations

import argparse
import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_flatten

from ppcl_fx.errors import GuardError, Refusal
from ppcl_fx.ir.graphs import parameter_count, used_parameters
from ppcl_fx.ir.sites import FfnSite, ffn_sites, text_site
from ppcl_fx.ir.stacks import Block, Stack, stacks
from ppcl_fx.model.rewrite import insert_edits
from ppcl_fx.passes.edits.ffn import projector_path
from ppcl_fx.passes.edits.plug import plugged
from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, Plan, TextStreamEdit
from ppcl_fx.tracing import bind, trace
from tests.coverage import dual, exports, more, single, video, video_more
from tests.coverage.case import EXAMPLE, OTHERS, Case, Kwargs
from tests.coverage.control import NotTaken, arguments, felt, passing, with_residuals
from tests.coverage.edits import shortened, without_feed_forwards, without_text
from tests.coverage.exports import Exports
from tests.coverage.page import render
from tests.passes.by_hand import randomise

CASES: list[Case] = sorted(
    [*dual.CASES, *single.CASES, *more.CASES, *video.CASES, *video_more.CASES], key=lambda case: case.id
)
PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"

EQUAL = "equal"
RETRACE = "re-trace"
NOT_TAKEN = "not taken"
_REASONS = {
    "has no feed-forward that stands alone": "not alone",
    "has no text stream of its own": "one stream",
    "no argument computed from the text stream alone": "streams joined",
}


@dataclass(frozen=True)
class Row:
    """What was measured of one class.

    Attributes:
        name: the class, with the variant.
        stacks: for each stack its name, number of blocks and chained streams.
        example: whether the trace is bit-equal on the traced call.
        others: the same on each other shape: `EQUAL`; `RETRACE`, a `GuardError`, after which a new trace was
            equal; or `NOT_TAKEN`, the model itself refuses that shape.
        edits: for each kind of edit, what it did in each stack.
    """

    name: str
    stacks: list[tuple[str, int, tuple[str, ...]]]
    example: str
    others: dict[str, str]
    edits: dict[str, list[str]] = field(default_factory=dict)

    @property
    def wrong(self) -> list[str]:
        """What must never be: answers that differ without an error."""
        cells = [self.example, *self.others.values(), *(cell for cells in self.edits.values() for cell in cells)]
        return [cell for cell in cells if "WRONG" in cell]


@dataclass(frozen=True)
class Traced:
    """A model, its trace, and the calls that the trace serves with what the model answers."""

    model: nn.Module
    gm: GraphModule
    stacks: list[Stack]
    served: list[tuple[Kwargs, Any]]

    @property
    def total(self) -> int:
        """Parameters of the model that its trace uses."""
        return parameter_count(self.gm)


@functools.cache
def measure(case: Case) -> Row:
    """Measure one row.

    Raises:
        PpclError: the class cannot be traced.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers deprecates parts of its own models
        model = case.build()
        example = case.kwargs()
        gm = trace(model, example)
        served = [(example, model(**case.kwargs()))]
        found = {"example": _answer(gm, *served[0])}
        for name, shape in OTHERS.items():
            found[name] = _other(model, gm, lambda shape=shape: case.kwargs(shape), served)
        traced = Traced(model, gm, stacks(gm), served)
        return Row(
            name=case.id,
            stacks=[(stack.name, len(stack.blocks), stack.streams) for stack in traced.stacks],
            example=found.pop("example"),
            others=found,
            edits={
                "depth": _depth(traced),
                "ffn": _ffn(traced),
                "text": _text(traced),
                "control": [_control(traced, case)],
            },
        )


def _other(
    model: nn.Module, gm: GraphModule, call: Callable[[], Kwargs], served: list[tuple[Kwargs, Any]]
) -> str:
    try:
        expected = model(**call())
    except (RuntimeError, ValueError, IndexError):
        return NOT_TAKEN
    try:
        answer = _answer(gm, call(), expected)
    except GuardError:
        return RETRACE if _answer(trace(model, call()), call(), expected) == EQUAL else "WRONG after a new trace"
    served.append((call(), expected))
    return answer


def _answer(gm: GraphModule, kwargs: Kwargs, expected: Any) -> str:
    return EQUAL if _same(gm(**bind(gm, kwargs)), expected) else "WRONG"


def _same(one: Any, two: Any) -> bool:
    left, right = tree_flatten(one)[0], tree_flatten(two)[0]
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# ---- edits -----------------------------------------------------------------------------------------------------------


def _rewritten(traced: Traced, edits: Sequence[Edit]) -> tuple[GraphModule, bool]:
    """Return the model with the edits plugged, and whether it is the teacher to the bit while they are not."""
    pluggable = insert_edits(traced.gm, Plan(edits=list(edits)))
    exact = all(_same(pluggable(**bind(pluggable, kwargs)), expected) for kwargs, expected in traced.served)
    return plugged(pluggable, frozenset(edit.id for edit in edits)), exact


def _depth(traced: Traced) -> list[str]:
    """Make two blocks one in every stack: the result must be the model whose second block repeats the first."""
    edits = {
        stack.name: DepthEdit(stack=stack.blocks[0].stack, first=stack.blocks[0].index, last=stack.blocks[1].index)
        for stack in traced.stacks
        if len(stack.blocks) > 1
    }
    cells = []
    for stack in traced.stacks:
        if stack.name not in edits:
            cells.append("one block")
            continue
        edit = edits[stack.name]
        view, exact = _rewritten(traced, [edit])
        for kwargs, _ in traced.served:
            with shortened(traced.model, [edit]):
                expected = traced.model(**kwargs)
            exact = exact and _same(view(**bind(view, kwargs)), expected)
        own = {id(p) for p in traced.model.get_submodule(stack.blocks[1].path).parameters()}
        gone = sum(p.numel() for p in used_parameters(traced.gm) if id(p) in own)
        kept = parameter_count(view) - (traced.total - gone)
        cells.append("WRONG" if not exact else "yes" if kept == 0 else f"yes, {'keeps' if kept > 0 else 'takes'} more")
    return cells


def _ffn(traced: Traced) -> list[str]:
    """Replace one block's feed-forwards in every stack; zeros must compute the model without those feed-forwards."""
    cells = []
    for stack in traced.stacks:
        block = stack.blocks[min(1, len(stack.blocks) - 1)]
        sites: list[FfnSite] = ffn_sites(traced.gm, block)
        try:
            view, exact = _rewritten(traced, [FfnEdit(stack=block.stack, block=block.index)])
        except Refusal as refusal:
            cells.append(_short(refusal))
            continue
        for kwargs, _ in traced.served:
            with without_feed_forwards(traced.model, [(block, site) for site in sites]):
                expected = traced.model(**kwargs)
            exact = exact and _close(view(**bind(view, kwargs)), expected)
        cells.append(", ".join(site.stream for site in sites) if exact else "WRONG")
    return cells


def _text(traced: Traced) -> list[str]:
    """Take the text stream from the second and third block of every stack, with random projectors."""
    cells = []
    for stack in traced.stacks:
        if len(stack.blocks) < 2:
            cells.append(_text_of_one(traced, stack.blocks[0]))
            continue
        blocks = stack.blocks[:3]
        edit = TextStreamEdit(stack=blocks[0].stack, source=blocks[0].index, last=blocks[-1].index)
        try:
            pluggable = insert_edits(traced.gm, Plan(edits=[edit]))
        except Refusal as refusal:
            cells.append(_short(refusal))
            continue
        randomise(pluggable)
        exact = all(_same(pluggable(**bind(pluggable, kwargs)), expected) for kwargs, expected in traced.served)
        view = plugged(pluggable, frozenset([edit.id]))
        keys = [block.path.replace(".", "_") for block in blocks[1:]]
        z = [pluggable.get_submodule(projector_path(edit.id, f"{key}.z")) for key in keys]
        state = pluggable.get_submodule(projector_path(edit.id, f"{keys[-1]}.state"))
        sites = [text_site(traced.gm, block) for block in blocks]
        for kwargs, plain in traced.served:
            with without_text(traced.model, sites, z, state):
                expected = traced.model(**kwargs)
            exact = exact and _same(view(**bind(view, kwargs)), expected) and not _close(expected, plain)
        cells.append("yes" if exact and parameter_count(view) < traced.total else "WRONG")
    return cells


def _text_of_one(traced: Traced, block: Block) -> str:
    try:
        text_site(traced.gm, block)
    except Refusal as refusal:
        return _short(refusal)
    return "one block"


def _control(traced: Traced, case: Case) -> str:
    """Give the model a ControlNet's residuals, and make one block of every stack."""
    names = list(arguments(traced.model))
    if not names:
        return "none"
    firsts = [stack.blocks[0].path for stack in traced.stacks]
    try:
        example = with_residuals(traced.model, firsts, case.kwargs())
    except NotTaken:
        return "not by block"
    gm = trace(traced.model, example)
    edits, refused = _whole_stacks(gm)
    pluggable = insert_edits(gm, Plan(edits=list[Edit](edits)))
    view = plugged(pluggable, frozenset(edit.id for edit in edits))
    exact = True
    for shape in (EXAMPLE, *OTHERS.values()):
        try:
            plain = case.kwargs(shape)
            given = with_residuals(traced.model, firsts, plain)
            exact = exact and _same(pluggable(**bind(pluggable, given)), traced.model(**given))
        except (GuardError, NotTaken, RuntimeError):
            assert shape is not EXAMPLE
            continue
        with passing(traced.model, edits, plain):
            expected = traced.model(**given)
        exact = exact and _same(view(**bind(view, given)), expected)
    if not exact:
        return "WRONG"
    whole = felt(lambda call: traced.model(**call), example, names)
    left = felt(lambda call: view(**bind(view, call)), example, names)
    return ", ".join(["summed" if whole == left else "own only", *(f"not in `{name}`" for name in refused)])


def _whole_stacks(gm: GraphModule) -> tuple[list[DepthEdit], list[str]]:
    """Return the edits that make one block of a whole stack, and the names of the stacks that refuse theirs."""
    edits, refused = [], []
    for stack in stacks(gm):
        first, last = stack.blocks[0], stack.blocks[-1]
        if first is last:
            continue
        edit = DepthEdit(stack=first.stack, first=first.index, last=last.index)
        try:
            insert_edits(gm, Plan(edits=[edit]))
            edits.append(edit)
        except Refusal:
            refused.append(stack.name)
    return edits, refused


def _close(one: Any, two: Any) -> bool:
    # A narrowed modulation is a smaller matrix product, which may round differently.
    left, right = tree_flatten(one)[0], tree_flatten(two)[0]
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(left, right, strict=True))


def _short(refusal: Refusal) -> str:
    for words, short in _REASONS.items():
        if words in str(refusal):
            return short
    return f"refused: {refusal}"


def page(found: Exports) -> str:
    """Return the page of all rows, with what is found of the types."""
    return render([measure(case) for case in CASES], found)


def main() -> None:
    """Write the page, or show it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} instead of showing it")
    parser.add_argument("--keep-types", action="store_true", help="export nothing; take these cells from the page")
    asked = parser.parse_args()
    found = exports.read(PAGE) if asked.keep_types else {
        case.id: {name: exports.exported(case, name) for name in exports.TYPES} for case in CASES
    }
    if asked.write:
        PAGE.write_text(page(found))
    else:
        sys.stdout.write(page(found))


if __name__ == "__main__":
    main()
