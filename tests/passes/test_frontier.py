"""The budget selector: against brute force, exact in parameters, and on the command line's terms."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator

import pytest

from ppcl_fx.errors import PpclError
from ppcl_fx.passes.analysis.intervals import first_difference
from ppcl_fx.passes.options import RewriteConfig
from ppcl_fx.passes.selection.frontier import frontier
from ppcl_fx.passes.selection.savings import saved
from ppcl_fx.passes.selection.select import Options, select
from ppcl_fx.passes.selection.sensitivity import LEARNED, predicted
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


def random_stack(
    seed: int, size: int, path: str = "blocks", first: int = 0, text: bool = True, grows: bool = False
) -> StackAnalysis:
    """A stack whose every number is random: nothing about it is convex or sorted. With `grows` a longer interval does
    more damage than its parts, as in real models."""
    pick = random.Random(seed)

    # What no training betters is that much better here, so that every kind of edit has its place.
    def gaps(scale: float) -> Matrix:
        if grows:
            change = [pick.uniform(0.01, 0.2) * scale for _ in range(size)]
            return [[sum(change[u + 1 : k + 1]) * (1 + 0.1 * (k - u)) if k >= u else None for k in range(size)]
                    for u in range(size)]  # fmt: skip
        return [[(round(pick.uniform(0.01, 2), 3) * scale if k > u else 0.0) if k >= u else None for k in range(size)]
                for u in range(size)]  # fmt: skip

    def curves(scale: float) -> StreamCurves:
        ones: Matrix = [[1.0 if k >= u else None for k in range(size)] for u in range(size)]
        candidates = [Interval(first=first, last=first + size - 1)]
        return StreamCurves(
            fit=[0.5] * size,
            cka=ones,
            delta=first_difference(ones),
            gap=gaps(scale),
            similarity=ones,
            energy=[round(pick.uniform(0.1, 1), 3) for _ in range(size)],
            candidates=candidates,
        )

    def savings(position: int) -> BlockSavings:
        ffn = pick.randrange(200, 500)
        if not text or position == 0:
            return BlockSavings(ffn=ffn)
        loss = pick.randrange(200, 400)
        return BlockSavings(ffn=ffn, ffn_without_text=ffn // 2, text=loss, text_last=loss - 30)

    streams = ["image", "text"] if text else ["image"]
    fits = [
        FfnFit(block=block + first, stream=stream, error=0.5, similarity=1 - LEARNED * pick.uniform(0, 0.5))
        for block in range(size)
        for stream in streams
    ]
    alike = [pick.choice([0.9999, 0.9999, 0.9]) if text else None for _ in range(size)]
    return StackAnalysis(
        name=path,
        path=path,
        first=first,
        blocks=[f"{path}.{first + i}" for i in range(size)],
        block_params=[1000] * size,
        streams={stream: curves(LEARNED if stream == "text" else 1.0) for stream in streams},
        text_similarity=alike,
        ffn=fits,
        savings=[savings(i) for i in range(size)],
    )


def analysis_of(*stacks: StackAnalysis) -> Redundancy:
    total = 500 + sum(sum(stack.block_params) for stack in stacks)
    return Redundancy(model="m", calls="c", teacher_params=total, calls_used=1, samples_used=1, stacks=list(stacks))


def every_plan(stack: StackAnalysis, most_ffn: int, least_cka: float = 0.999) -> Iterator[list[Edit]]:
    """Every set of edits of a stack that is a plan, found by trying all of them."""
    low, high = stack.first, stack.last
    spans = [(a, b) for a in range(low, high + 1) for b in range(a + 1, high + 1)]
    alike = {
        low + i
        for i, value in enumerate(stack.text_similarity)
        if value is not None and value >= least_cka and stack.savings[i].text_last is not None
    }
    groups = [(a, b) for a, b in spans if all(i in alike for i in range(a + 1, b + 1))]
    for depth in _disjoint(spans):
        inside = {i for a, b in depth for i in range(a, b + 1)}
        for text in _disjoint(groups):
            if any(s in inside or any(a <= t < b for a, b in depth) for s, t in text):
                continue
            for count in range(most_ffn + 1):
                for blocks in itertools.combinations([i for i in range(low, high + 1) if i not in inside], count):
                    yield [
                        *(DepthEdit(stack=stack.path, first=a, last=b) for a, b in depth),
                        *(TextStreamEdit(stack=stack.path, source=s, last=t) for s, t in text),
                        *(FfnEdit(stack=stack.path, block=i) for i in blocks),
                    ]


def _disjoint(spans: list[tuple[int, int]]) -> list[tuple[tuple[int, int], ...]]:
    return [
        chosen
        for count in range(len(spans) + 1)
        for chosen in itertools.combinations(spans, count)
        if all(one[1] < two[0] for one, two in itertools.pairwise(sorted(chosen)))
    ] if len(spans) <= 10 else _grown(spans)  # fmt: skip


def _grown(spans: list[tuple[int, int]]) -> list[tuple[tuple[int, int], ...]]:
    found: list[tuple[tuple[int, int], ...]] = [()]
    for chosen in found:
        found += [(*chosen, span) for span in spans if not chosen or span[0] > chosen[-1][1]]
    return found


def brute_force(analysis: Redundancy, most_ffn: int) -> list[tuple[int, float]]:
    """The frontier as (saved, damage), from every plan there is."""
    best: dict[tuple[int, int], float] = {(0, 0): 0.0}
    for stack in analysis.stacks:
        own: dict[tuple[int, int], float] = {}
        for edits in every_plan(stack, most_ffn):
            told = predicted(analysis, Plan(edits=edits))
            damage = sum(edit.damage or 0.0 for edit in told.edits)
            key = (saved(analysis, edits), sum(isinstance(edit, FfnEdit) for edit in edits))
            own[key] = min(own.get(key, 1e9), damage)
        joined: dict[tuple[int, int], float] = {}
        for (a, m), x in best.items():
            for (b, n), y in own.items():
                if m + n <= most_ffn:
                    joined[a + b, m + n] = min(joined.get((a + b, m + n), 1e9), x + y)
        best = joined
    points: list[tuple[int, float]] = []
    for (amount, _), damage in sorted(best.items(), key=lambda item: (-item[0][0], item[1])):
        if not points or damage < points[-1][1] - 1e-12:
            points.append((amount, damage))
    return points[::-1]


@pytest.mark.parametrize(("seed", "size"), [(0, 4), (1, 5), (2, 5), (3, 5)])
def test_the_frontier_is_that_of_all_plans(seed: int, size: int) -> None:
    analysis = analysis_of(random_stack(seed, size, first=2))
    points = frontier(analysis, Options(budget=0, ffn=2))
    expected = brute_force(analysis, 2)
    assert [analysis.teacher_params - point.params for point in points] == [amount for amount, _ in expected]
    assert [point.damage for point in points] == pytest.approx([damage for _, damage in expected])


def test_stacks_share_one_budget_and_one_number_of_feed_forwards() -> None:
    analysis = analysis_of(random_stack(4, 4, "double"), random_stack(5, 4, "single", text=False))
    points = frontier(analysis, Options(budget=0, ffn=2))
    expected = brute_force(analysis, 2)
    assert [analysis.teacher_params - point.params for point in points] == [amount for amount, _ in expected]
    assert [point.damage for point in points] == pytest.approx([damage for _, damage in expected])
    assert all(sum(isinstance(edit, FfnEdit) for edit in point.edits) <= 2 for point in points)


def test_each_point_is_a_plan_whose_parameters_and_damage_are_the_edits_own() -> None:
    analysis = analysis_of(random_stack(6, 9), random_stack(7, 6, "single", text=False))
    points = frontier(analysis, Options(budget=0, ffn=3, init="middle"))
    assert (points[0].params, points[0].damage, points[0].edits) == (analysis.teacher_params, 0.0, ())
    for smaller, point in itertools.pairwise(points[::-1]):
        assert smaller.params < point.params and smaller.damage > point.damage
    for point in points:
        plan = Plan(edits=list(point.edits))
        plan.check()
        assert analysis.teacher_params - saved(analysis, plan.edits) == point.params
        assert sum(edit.damage or 0.0 for edit in plan.edits) == pytest.approx(point.damage)
        assert all(edit.init == "middle" for edit in plan.depth())


@pytest.mark.parametrize("keep", [1.0, 0.9, 0.7, 0.5, 0.3])
@pytest.mark.parametrize("width", [False, True])
def test_the_rule_takes_the_frontier_s_point_and_is_never_worse_than_the_paper_s(keep: float, width: bool) -> None:
    analysis = analysis_of(random_stack(8, 10))
    plan = select(analysis, keep, RewriteConfig(select="budget", width=width))
    assert plan.params <= keep * analysis.teacher_params
    points = frontier(analysis, Options(budget=0, width=width))
    (point,) = [point for point in points if point.params == plan.params]
    assert list(point.edits) == plan.edits
    assert not [p for p in points if p.params <= keep * analysis.teacher_params and p.damage < point.damage]
    assert width or not [edit for edit in plan.edits if not isinstance(edit, DepthEdit)]
    paper = predicted(analysis, select(analysis, keep, RewriteConfig(select="paper", width=width)))
    assert point.damage <= sum(edit.damage or 0.0 for edit in paper.edits) + 1e-12


def test_the_reasons_say_what_a_step_along_the_frontier_costs() -> None:
    plan = select(analysis_of(random_stack(8, 10)), 0.6, RewriteConfig(select="budget"))
    text = "\n".join(plan.reason)
    assert "the least predicted damage" in text and "the next larger model:" in text
    assert "the next smaller model:" in text
    assert f"{plan.ids[0]}: saves" in text


def test_a_budget_below_the_smallest_model_is_refused_with_its_size() -> None:
    analysis = analysis_of(random_stack(8, 6))
    least = frontier(analysis, Options(budget=0))[-1].params
    assert select(analysis, config=RewriteConfig(params=least, select="budget")).params == least
    with pytest.raises(PpclError, match=rf"the smallest keeps {least:,}; ask for more"):
        select(analysis, config=RewriteConfig(params=least - 1, select="budget"))


def test_a_model_as_deep_as_qwen_image_has_its_frontier_in_seconds() -> None:
    analysis = analysis_of(random_stack(9, 60, grows=True))
    started = time.process_time()
    points = frontier(analysis, Options(budget=0))
    assert time.process_time() - started < 60
    assert len(points) > 200
    assert points[-1].params < 3000
