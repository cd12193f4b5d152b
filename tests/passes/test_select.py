"""From analyses made by hand to plans: budgets, the paper's rules, the control, and refusals."""

from __future__ import annotations

import itertools

import pytest

from ppcl_fx.errors import PpclError
from ppcl_fx.passes.analysis.intervals import first_difference
from ppcl_fx.passes.options import RewriteConfig
from ppcl_fx.passes.selection.rules import cheapest_covers, within
from ppcl_fx.passes.selection.savings import saved
from ppcl_fx.passes.selection.select import RULES, rule, select
from ppcl_fx.passes.selection.sensitivity import LEARNED
from ppcl_fx.schema.analysis import (
    BlockSavings,
    FfnFit,
    Interval,
    Matrix,
    Redundancy,
    StackAnalysis,
    StreamCurves,
)
from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, Plan, TextStreamEdit

BLOCK = 1000
SAVINGS = BlockSavings(ffn=550, ffn_without_text=275, text=390, text_last=360)


def _curves(change: list[float], candidates: list[tuple[int, int]], first: int) -> StreamCurves:
    """Curves in which block i adds ``change[i]`` to the gap, and long intervals cost a little more than their
    parts."""
    size = len(change)
    gap: Matrix = [[None] * size for _ in range(size)]
    cka: Matrix = [[None] * size for _ in range(size)]
    for u in range(size):
        for k in range(u, size):
            gap[u][k] = sum(change[u + 1 : k + 1]) * (1 + 0.1 * (k - u))
            cka[u][k] = 1 - (gap[u][k] or 0.0) / 4
    return StreamCurves(
        fit=[0.5] * size,
        cka=cka,
        delta=first_difference(cka),
        gap=gap,
        similarity=cka,
        energy=[1.0] * size,
        candidates=[Interval(first=a + first, last=b + first) for a, b in candidates],
    )


def _stack(
    change: list[float],
    candidates: list[tuple[int, int]],
    *,
    path: str = "blocks",
    name: str | None = None,
    first: int = 0,
    block: int = BLOCK,
    text: list[float] | None = None,
    ffn: list[float] | None = None,
) -> StackAnalysis:
    size = len(change)
    savings = [SAVINGS.model_copy(update={"text": None, "text_last": None}), *[SAVINGS] * (size - 1)]
    # A student learns beyond what its probes predict, a projector does not: so the fits are that much better here.
    near = [1 - LEARNED * (1 - s) for s in ffn or []]
    fits = [FfnFit(block=i + first, stream="image", error=0.5, similarity=s) for i, s in enumerate(near)]
    return StackAnalysis(
        name=name or path,
        path=path,
        first=first,
        blocks=[f"{path}.{i + first}" for i in range(size)],
        block_params=[block] * size,
        streams={"image": _curves(change, candidates, first)}
        | ({"text": _curves([0.001] * size, [], first)} if text else {}),
        text_similarity=list(text or [0.5] * size),
        ffn=fits,
        savings=savings,
    )


def _analysis(*stacks: StackAnalysis, rest: int = 0) -> Redundancy:
    total = rest + sum(sum(stack.block_params) for stack in stacks)
    return Redundancy(
        model="m", calls="c", teacher_params=total, calls_used=1, samples_used=1, stacks=list(stacks)
    )


def _eight() -> Redundancy:
    change = [0.9, 0.5, 0.1, 0.2, 0.1, 0.3, 0.1, 0.8]
    return _analysis(_stack(change, [(0, 2), (3, 5), (6, 7)], ffn=[0.1, 0.99, 0.9, 0.9, 0.9, 0.9, 0.9, 0.98]))


def test_depth_alone_meets_the_budget_with_the_least_damage() -> None:
    plan = select(_eight(), keep=0.75, config=RewriteConfig(width=False))
    assert plan.params == 6000
    # Of the pairs inside the candidates: [1, 2] and [3, 4] change least; [3, 5] and [6, 7] cost more.
    assert plan.ids == ["depth:blocks.1-2", "depth:blocks.3-4"]
    assert [edit.damage for edit in plan.edits] == pytest.approx([LEARNED * 0.11, LEARNED * 0.11])
    assert plan.model == "m"
    assert any("candidate intervals [0, 2] [3, 5] [6, 7]" in line for line in plan.reason)
    assert any(line.startswith("depth:blocks.1-2: saves 1,000 parameters") for line in plan.reason)


@pytest.mark.parametrize("keep", [1.0, 0.9, 0.75, 0.7, 0.6, 0.5, 0.4])
@pytest.mark.parametrize("width", [False, True])
def test_params_are_below_the_budget_and_no_more_than_one_block_below(keep: float, width: bool) -> None:
    analysis = _eight()
    plan = select(analysis, keep, RewriteConfig(width=width))
    plan.check()
    assert plan.params == analysis.teacher_params - saved(analysis, plan.edits)
    assert keep * 8000 - BLOCK < plan.params <= keep * 8000
    assert select(analysis, keep, RewriteConfig(width=width)) == plan


def test_keeping_everything_replaces_nothing() -> None:
    plan = select(_eight(), 1.0)
    assert plan.edits == [] and plan.params == 8000


def test_a_number_of_parameters_is_a_budget_too() -> None:
    assert select(_eight(), config=RewriteConfig(params=6999, width=False)).params == 6000
    assert select(_eight(), config=RewriteConfig(width=False)) == select(_eight(), 0.5, RewriteConfig(width=False))


def test_neighbours_merge_where_that_does_less_damage() -> None:
    single = select(_eight(), config=RewriteConfig(params=6000, width=False))
    assert single.ids == ["depth:blocks.1-2", "depth:blocks.3-4"]
    assert not any("merged" in line for line in single.reason)
    # [0, 2], [3, 5] and [6, 7] would do, but a change of 0.9 at block 0 and of 0.8 at block 7 can be left alone.
    merged = select(_eight(), config=RewriteConfig(params=3000, width=False))
    assert merged.ids == ["depth:blocks.1-6"]
    assert any("3 neighbouring candidates were merged" in line for line in merged.reason)
    assert select(_eight(), config=RewriteConfig(params=1000, width=False)).ids == ["depth:blocks.0-7"]


def test_an_early_error_counts_by_its_size_against_the_last_state() -> None:
    change, candidates = [0.1] * 6, [(0, 1), (2, 3), (4, 5)]
    even = _stack(change, candidates)
    growing = even.streams["image"].model_copy(update={"energy": [1.0, 1.0, 0.5, 0.3, 0.8, 1.0]})
    assert select(_analysis(even), config=RewriteConfig(params=5000)).ids == ["depth:blocks.0-1"]
    plan = select(_analysis(even.model_copy(update={"streams": {"image": growing}})), config=RewriteConfig(params=5000))
    assert plan.ids == ["depth:blocks.2-3"]
    assert plan.edits[0].damage == pytest.approx(LEARNED * 0.1 * 1.1 * 0.3)


def test_only_the_deciding_stream_counts() -> None:
    stack = _stack([0.1, 0.1, 0.1, 0.2], [(0, 1), (2, 3)], text=[0.9] * 4)
    noisy = _curves([0.1, 5.0, 0.1, 0.1], [(0, 1), (2, 3)], 0)
    analysis = _analysis(stack.model_copy(update={"streams": {**stack.streams, "text": noisy}}))
    assert select(analysis, config=RewriteConfig(params=3000)).ids == ["depth:blocks.0-1"]
    assert select(analysis, config=RewriteConfig(params=3000, stream="text")).ids == ["depth:blocks.2-3"]


def test_a_budget_below_one_block_is_refused() -> None:
    with pytest.raises(PpclError, match="no plan keeps 999 of 8,000 parameters"):
        select(_eight(), config=RewriteConfig(params=999, width=False))


def test_top_feed_forwards_outside_of_intervals_go() -> None:
    stack = _eight().stacks[0]
    third = stack.ffn[3].model_copy(update={"similarity": 1 - LEARNED * 0.025})
    fits = [third if fit.block == 3 else fit for fit in stack.ffn]
    plan = select(_analysis(stack.model_copy(update={"ffn": fits})), config=RewriteConfig(params=6000, ffn=2))
    # Depth takes [1, 2]; of the blocks left, 7 is the most similar, then 3: less damage than a second interval.
    assert plan.ids == ["depth:blocks.1-2", "ffn:blocks.7", "ffn:blocks.3"]
    assert plan.edits[1].damage == pytest.approx(LEARNED * 0.04)
    assert plan.params == 8000 - 1000 - 2 * 550


def test_width_edits_that_are_not_needed_are_dropped_weakest_first() -> None:
    assert select(_eight(), config=RewriteConfig(params=8000 - 1000)).ids == ["ffn:blocks.1", "ffn:blocks.7"]
    assert select(_eight(), config=RewriteConfig(params=8000 - 550)).ids == ["ffn:blocks.1"]
    assert select(_eight(), config=RewriteConfig(params=8000 - 550, width=False)).ids == ["depth:blocks.1-2"]


def test_text_streams_go_deeper_first_and_around_intervals() -> None:
    text = [0.1, 0.9995, 0.9, 0.9, 0.9995, 0.9995, 0.9995, 0.9995]
    analysis = _analysis(_stack([1, 1, 1, 1, 1, 0.1, 1, 1], [(0, 3), (4, 5), (6, 7)], text=text))
    plan = select(analysis, config=RewriteConfig(params=8000 - 2 * 390 - 360))
    # (3, 7] are four blocks: 3 x 390 + 360. The budget needs three of them, the deepest.
    assert plan.ids == ["text_stream:blocks.4-7"]
    assert plan.params == 8000 - 2 * 390 - 360
    assert plan.edits[0].damage == pytest.approx(0.001 * 1.1 + 0.002 * 1.2 + 0.003 * 1.3)
    every = select(analysis, config=RewriteConfig(params=8000 - 1000 - 2 * 390 - 360))
    assert every.ids == ["depth:blocks.4-5", "text_stream:blocks.3-7"]
    # Block 5 is gone, so three blocks lose their text stream: 4, 6 and 7.
    assert saved(analysis, every.edits) == 1000 + 2 * 390 + 360


def test_a_text_group_neither_starts_nor_ends_inside_an_interval() -> None:
    from ppcl_fx.passes.selection.rules import text_edits
    from ppcl_fx.passes.selection.select import Options

    text = [0.1, 0.9, 0.9, 0.9995, 0.9995, 0.9995, 0.9995, 0.9]
    analysis = _analysis(_stack([0.5] * 8, [(0, 7)], text=text))
    options = Options(budget=1)

    def groups(*spans: tuple[int, int]) -> list[str]:
        depth = [DepthEdit(stack="blocks", first=a, last=b) for a, b in spans]
        return [edit.id for edit in text_edits(analysis, depth, options)]

    assert groups() == ["text_stream:blocks.2-6"]
    assert groups((1, 2)) == ["text_stream:blocks.3-6"]
    assert groups((2, 4)) == ["text_stream:blocks.5-6"]
    assert groups((6, 7)) == ["text_stream:blocks.2-5"]
    assert groups((1, 3), (4, 5)) == []  # 6 would be the source, and nothing is left after it
    assert groups((1, 5), (6, 7)) == []
    assert groups((3, 4), (5, 6)) == ["text_stream:blocks.2-6"]


def test_feed_forward_and_text_stream_of_one_block_are_not_counted_twice() -> None:
    edits: list[Edit] = [
        TextStreamEdit(stack="blocks", source=5, last=7),
        FfnEdit(stack="blocks", block=7),
        FfnEdit(stack="blocks", block=2),
    ]
    assert saved(_eight(), edits) == 390 + 360 + 275 + 550
    # A feed-forward inside of a removed run saves nothing more.
    assert (
        saved(_eight(), [DepthEdit(stack="blocks", first=1, last=3), FfnEdit(stack="blocks", block=2)])
        == 2000
    )


def test_two_stacks_share_one_budget_and_no_interval_crosses() -> None:
    double = _stack([0.1] * 4, [(0, 3)], path="double", block=1000)
    single = _stack([0.4] * 6, [(0, 5)], path="single", block=400)
    plan = select(_analysis(double, single), config=RewriteConfig(params=6400 - 1000, width=False))
    assert plan.ids == ["depth:double.0-1"]
    smallest = select(_analysis(double, single), config=RewriteConfig(params=1400, width=False))
    assert smallest.ids == ["depth:double.0-3", "depth:single.0-5"]


def test_two_stacks_of_one_module_list_keep_their_indices() -> None:
    one = _stack([0.9] * 3, [(0, 2)], name="blocks:0-2")
    two = _stack([0.1] * 4, [(0, 3)], name="blocks:3-6", first=3)
    plan = select(_analysis(one, two), config=RewriteConfig(params=5000, width=False))
    assert plan.ids == ["depth:blocks.3-4", "depth:blocks.5-6"]
    assert plan.params == 5000


def uniform(keep: float) -> Plan:
    return select(_eight(), keep, select="uniform", width=False)


def test_uniform_removes_evenly_spaced_blocks_at_the_same_budget() -> None:
    plan = uniform(0.5)
    assert plan.ids == [f"depth:blocks.{i}-{i + 1}" for i in (0, 2, 4, 6)]
    assert plan.params == 4000
    assert uniform(0.75).params == 6000
    third = uniform(0.375)
    assert third.params == 3000
    assert all(isinstance(edit, DepthEdit) for edit in third.edits)
    third.check()


def test_covers_are_the_best_of_all_covers() -> None:
    """Against brute force over every set of disjoint intervals."""
    size = 6
    damage = {
        (a, b): ((a * 7 + b * 13) % 11 + 1) * (b - a) / 10 for a in range(size) for b in range(a + 1, size)
    }
    best: dict[int, float] = {0: 0.0}
    spans = list(damage)
    for count in range(1, 4):
        for chosen in itertools.combinations(spans, count):
            if all(x[1] < y[0] for x, y in itertools.pairwise(sorted(chosen))):
                removed = sum(b - a for a, b in chosen)
                best[removed] = min(best.get(removed, 99.0), sum(damage[s] for s in chosen))
    covers = cheapest_covers(size, lambda span: True, damage.__getitem__)
    assert {r: c.damage for r, c in enumerate(covers) if c is not None} == pytest.approx(best)
    assert all(c is None or sum(last - first for first, last in c.spans) == r for r, c in enumerate(covers))


def test_within_merges_neighbours_only() -> None:
    candidates = [Interval(first=3, last=4), Interval(first=5, last=7), Interval(first=9, last=10)]
    alone, two = within(candidates, 3, 1), within(candidates, 3, 2)
    assert alone((0, 1)) and alone((3, 4)) and not alone((1, 2))
    assert two((0, 4)) and two((1, 2)) and not two((4, 6))


@pytest.mark.parametrize("keep", [1.5, 0.0, -0.1, float("nan")])
def test_a_share_outside_of_0_to_1_is_refused(keep: float) -> None:
    with pytest.raises(PpclError, match="above 0 and at most 1"):
        select(_eight(), keep)


def test_misspelt_names_are_refused_with_a_near_match() -> None:
    with pytest.raises(PpclError, match="did you mean 'paper'"):
        select(_eight(), config=RewriteConfig(select="papper"))
    two = _eight().stacks[0]
    both = two.model_copy(update={"streams": {"image": two.streams["image"], "text": two.streams["image"]}})
    with pytest.raises(PpclError, match="did you mean 'image'"):
        select(_analysis(both), config=RewriteConfig(stream="imgae"))
    with pytest.raises(PpclError, match="not both"):
        select(_eight(), 0.5, RewriteConfig(params=5))
    with pytest.raises(PpclError, match="between 1 and"):
        select(_eight(), config=RewriteConfig(params=10**9))
    with pytest.raises(PpclError, match="option params: .* greater than or equal to 1"):
        RewriteConfig(params=0)


def test_a_rule_can_be_added() -> None:
    select(_eight())  # registers the built-in ones
    name = "nothing-at-all"
    try:
        rule(name)(lambda analysis, options: RULES["uniform"](analysis, options))
        assert isinstance(select(_eight(), config=RewriteConfig(select=name)), Plan)
        with pytest.raises(RuntimeError, match="twice"):
            rule(name)(RULES["paper"])
    finally:
        RULES.pop(name)
