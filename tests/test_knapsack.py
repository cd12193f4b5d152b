"""The choice of edits: as good as trying every set, and what sets save is counted exactly."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence

import pytest

from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.model.rewrite import rewrite
from ppcl_fx.passes.selection.knapsack import COUNTED, cheapest, least_within, saving_terms, savings, touching
from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, Plan, TextStreamEdit
from ppcl_fx.tracing import trace
from tests import models
from tests.passes.test_plug import BUILD, DUAL, EDITS

A, B = "blocks", "others"
MIXED: list[Edit] = [
    FfnEdit(stack=A, block=9),
    DepthEdit(stack=A, first=3, last=5),
    TextStreamEdit(stack=A, source=2, last=6),
    FfnEdit(stack=A, block=3),
    DepthEdit(stack=B, first=3, last=5),
    TextStreamEdit(stack=A, source=6, last=9),
    FfnEdit(stack=A, block=0),
    DepthEdit(stack=A, first=7, last=8),
    FfnEdit(stack=B, block=7),
]


def _sets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(len(names) + 1))


def test_edits_touch_where_they_share_a_block() -> None:
    names = [edit.id for edit in MIXED]
    touch = touching(MIXED)
    assert sorted(touch) == sorted(names)
    assert touch[f"ffn:{A}.0"] == touch[f"ffn:{B}.7"] == touch[f"depth:{B}.3-5"] == frozenset()
    groups = {f"text_stream:{A}.2-6", f"text_stream:{A}.6-9"}
    assert touch[f"ffn:{A}.3"] == groups | {f"depth:{A}.3-5"}, "groups that meet are one to the others"
    assert touch[f"depth:{A}.3-5"] == groups | {f"ffn:{A}.3", f"depth:{A}.7-8"}, "and so are intervals within them"
    assert all(one in touch[two] for one in touch for two in touch[one])


@pytest.mark.parametrize("seed", range(8))
def test_no_set_of_edits_is_cheaper(seed: int) -> None:
    draw = random.Random(seed)
    touch = touching(MIXED)
    names = list(touch)
    # Savings that depend on each other at random, even so that plugging more saves less.
    terms = {
        frozenset(some): draw.randrange(1, 60) if len(some) == 1 else draw.randrange(-30, 30)
        for some in _sets(names)
        if some and all(two in touch[one] for one, two in itertools.combinations(some, 2))
    }
    costs = {name: draw.choice((0.0, draw.random(), float(draw.randrange(4)))) for name in names}
    saved = {some: savings(some, terms) for some in _sets(names)}
    most = max(saved.values())
    for need in {0, 1, most // 3, most // 2, most - 1, most, *draw.sample(sorted(saved.values()), 5)}:
        found = cheapest(touch, terms, costs, need)
        price = min((math.fsum(costs[e] for e in some), len(some)) for some in saved if saved[some] >= need)
        assert found is not None
        assert savings(found, terms) >= need
        assert math.fsum(costs[e] for e in found) == pytest.approx(price[0], rel=1e-12)
        if need <= 0:
            assert found == ()
    assert cheapest(touch, terms, costs, most + 1) is None


@pytest.fixture(scope="module")
def tail() -> PluggableModel:
    """Intervals in a text group at the model's end: what is left of the text stream before it depends on all."""
    edits: list[Edit] = [
        DepthEdit(stack=DUAL, first=2, last=3),
        DepthEdit(stack=DUAL, first=4, last=5),
        TextStreamEdit(stack=DUAL, source=1, last=6),
        FfnEdit(stack=DUAL, block=1),
    ]
    return rewrite(trace(*models.tiny_qwen(blocks=7)), Plan(edits=edits))


@pytest.mark.parametrize("counted", [COUNTED, 0])
def test_intervals_in_a_text_group_are_counted_together(tail: PluggableModel, counted: int) -> None:
    touch = touching(tail.plan.edits)
    terms = saving_terms(touch, tail.param_count, counted)
    saved = {some: tail.teacher_params - tail.param_count(some) for some in _sets(tail.edits)}
    right = [savings(some, terms) == saved[some] for some in saved]
    assert all(right) == (counted > 0), "pairs alone do not tell what a set saves"
    draw = random.Random(0)
    for need in sorted(saved.values())[1::3]:
        costs = {edit: draw.random() for edit in tail.edits}
        found = least_within(touch, tail.param_count, costs, tail.teacher_params - need, counted)
        assert found is not None
        assert saved[tuple(edit for edit in tail.edits if edit in found)] >= need
        if counted:
            best = min(math.fsum(costs[e] for e in some) for some in saved if saved[some] >= need)
            assert math.fsum(costs[e] for e in found) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("kind", list(BUILD))
def test_what_any_set_saves_is_counted_to_the_parameter(kind: str) -> None:
    model = rewrite(trace(*BUILD[kind]()), Plan(edits=EDITS[kind]))
    asked: list[frozenset[str]] = []

    def params(students: Sequence[str]) -> int:
        asked.append(frozenset(students))
        return model.param_count(students)

    terms = saving_terms(touching(model.plan.edits), params)
    assert len(asked) == len(set(asked)) < 2 ** len(model.edits), "only sets that touch are counted"
    for some in (some for some in _sets(model.edits) if len(some) != 3):
        assert savings(some, terms) == model.teacher_params - model.param_count(some)
