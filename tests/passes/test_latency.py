"""A budget of time: against brute force with sums of its own, and every refusal."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from ppcl_fx.errors import PpclError
from ppcl_fx.passes.options import RewriteConfig
from ppcl_fx.passes.selection.frontier import frontier
from ppcl_fx.passes.selection.latency import TICKS, in_time
from ppcl_fx.passes.selection.savings import saved
from ppcl_fx.passes.selection.select import Options, select
from ppcl_fx.passes.selection.sensitivity import predicted
from ppcl_fx.schema.analysis import Redundancy, StackAnalysis
from ppcl_fx.schema.costs import BlockCost, Costs, StackCost
from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, Plan, TextStreamEdit
from tests.passes.test_frontier import analysis_of, every_plan, random_stack


def random_costs(analysis: Redundancy, seed: int, alike: bool = False) -> Costs:
    """Costs at random, a projector sometimes dearer than what it replaces; with `alike` a stack's blocks share them."""
    pick = random.Random(seed)

    def block() -> BlockCost:
        whole = pick.uniform(5, 10)
        return BlockCost(
            whole=whole,
            ffn=whole - pick.uniform(-0.5, 4),
            text=whole - pick.uniform(1, 4),
            text_last=whole - pick.uniform(-0.5, 3),
            text_last_ffn=whole - pick.uniform(2, 5),
        )

    def stack(own: StackAnalysis) -> StackCost:
        blocks = [block()] * len(own.blocks) if alike else [block() for _ in own.blocks]
        return StackCost(path=own.path, first=own.first, blocks=blocks)

    return Costs(model="m", repeats=1, rest=3.5, stacks=[stack(own) for own in analysis.stacks])


def milliseconds(analysis: Redundancy, costs: Costs, edits: Iterable[Edit]) -> float:
    """What the package predicts of a model with these edits."""
    timed = in_time(analysis, costs)
    return (timed.teacher_params - saved(timed, edits)) / TICKS


def added_up(costs: Costs, edits: list[Edit]) -> float:
    """The milliseconds of a set of edits, block by block: independent of how the package sums them."""
    total = costs.rest
    for stack in costs.stacks:
        own = [edit for edit in edits if edit.stack == stack.path]
        gone = {i for e in own if isinstance(e, DepthEdit) for i in range(e.first + 1, e.last + 1)}
        replaced = {e.block for e in own if isinstance(e, FfnEdit)}
        groups = [
            [i for i in range(e.source + 1, e.last + 1) if i not in gone]
            for e in own
            if isinstance(e, TextStreamEdit)
        ]
        for index, block in enumerate(stack.blocks, stack.first):
            ends, inside = (any(index in group[at] for group in groups) for at in (slice(-1, None), slice(0, -1)))
            if index in gone:
                continue
            left = block.text_last if ends else block.text if inside else block.whole
            assert left is not None and block.ffn is not None
            assert block.text_last is not None and block.text_last_ffn is not None
            if index in replaced:
                left -= block.text_last - block.text_last_ffn if ends or inside else block.whole - block.ffn
            total += left
    return total


def brute_force(analysis: Redundancy, costs: Costs, most_ffn: int) -> list[tuple[float, float]]:
    """The frontier as (milliseconds, damage) from every plan of every stack."""
    every = itertools.product(*(list(every_plan(stack, most_ffn)) for stack in analysis.stacks))
    found = []
    for parts in every:
        edits = [edit for part in parts for edit in part]
        if sum(isinstance(edit, FfnEdit) for edit in edits) <= most_ffn:
            told = predicted(analysis, Plan(edits=edits))
            found.append((added_up(costs, edits), sum(edit.damage or 0.0 for edit in told.edits)))
    points: list[tuple[float, float]] = []
    for spent, damage in sorted(found):
        if not points or damage < points[-1][1] - 1e-12:
            points.append((spent, damage))
    return points[::-1]


@pytest.mark.parametrize(
    "analysis",
    [
        analysis_of(random_stack(0, 4, first=2)),
        analysis_of(random_stack(1, 5)),
        analysis_of(random_stack(4, 3, "double"), random_stack(5, 3, "single", text=False)),
    ],
    ids=["four", "five", "two stacks"],
)
def test_the_frontier_over_time_is_that_of_all_plans(analysis: Redundancy) -> None:
    costs = random_costs(analysis, 1)
    points = frontier(in_time(analysis, costs), Options(budget=0, ffn=2))
    expected = brute_force(analysis, costs, 2)
    assert [point.params / TICKS for point in points] == pytest.approx([spent for spent, _ in expected], abs=1e-4)
    assert [point.damage for point in points] == pytest.approx([damage for _, damage in expected])
    for point in points:
        edits = list(point.edits)
        Plan(edits=edits).check()
        spent = milliseconds(analysis, costs, edits)
        assert spent == point.params / TICKS == pytest.approx(added_up(costs, edits))


@pytest.mark.parametrize("share", [1.0, 0.8, 0.6, 0.4])
def test_a_plan_for_a_latency_does_the_least_damage_within_it(share: float) -> None:
    analysis = analysis_of(random_stack(8, 8))
    costs = random_costs(analysis, 2)
    plan = select(analysis, config=RewriteConfig(latency=share), costs=costs)
    spent = milliseconds(analysis, costs, plan.edits)
    assert spent <= share * costs.total + 1e-6
    points = frontier(in_time(analysis, costs), Options(budget=0))
    damage = sum(edit.damage or 0.0 for edit in plan.edits)
    assert damage == pytest.approx(min(p.damage for p in points if p.params / TICKS <= share * costs.total + 1e-6))
    assert plan.params == analysis.teacher_params - saved(analysis, plan.edits)
    assert "rule budget: at most " in plan.reason[0] and " ms may stay; " in plan.reason[0]
    assert any(line.startswith("the next ") and " ms, predicted damage " in line for line in plan.reason)
    config = RewriteConfig(latency=f"{share * costs.total}ms", select="budget")
    assert select(analysis, config=config, costs=costs).edits == plan.edits


def test_time_is_counted_in_whole_nanoseconds() -> None:
    analysis = analysis_of(random_stack(0, 2))
    block = BlockCost(whole=0.1 + 0.2, ffn=0.3)
    costs = Costs(model="m", repeats=1, rest=0, stacks=[StackCost(path="blocks", first=0, blocks=[block] * 2)])
    timed = in_time(analysis, costs)
    assert timed.stacks[0].block_params == [300_000, 300_000] and timed.teacher_params == 600_000
    assert timed.stacks[0].savings[0].ffn == 0 and timed.stacks[0].savings[1].text_last is None
    assert select(analysis, config=RewriteConfig(latency="0.3ms"), costs=costs).ids == ["depth:blocks.0-1"]


def test_a_deep_model_with_alike_blocks_has_its_frontier_in_seconds() -> None:
    analysis = analysis_of(random_stack(9, 40, grows=True))
    started = time.process_time()
    assert len(frontier(in_time(analysis, random_costs(analysis, 3, alike=True)), Options(budget=0))) > 50
    assert time.process_time() - started < 60


def test_refusals() -> None:
    analysis = analysis_of(random_stack(8, 6))
    costs = random_costs(analysis, 4)
    (stack,) = costs.stacks
    quickest = frontier(in_time(analysis, costs), Options(budget=0))[-1].params / TICKS
    cases: list[tuple[Costs | None, dict[str, Any], str]] = [
        (costs, {"latency": 0.001}, rf"no plan runs in .* ms: the quickest takes {quickest:.4g} ms; ask for more time"),
        (costs, {"latency": 1.5}, "latency 1.5: neither a share of the teacher's time"),
        (costs, {"latency": "soon"}, "latency soon: neither a share"),
        (costs, {"latency": "-3ms"}, "latency -3ms: neither a share"),
        (costs, {"latency": "nan"}, "latency nan: neither a share"),
        (costs, {"latency": 0.5, "keep": 0.5}, "either latency or a size"),
        (costs, {"latency": 0.5, "select": "paper"}, "the rule 'paper' knows no time; with latency take the rule"),
        (costs, {"latency": 0.5, "select": "uniform"}, "the rule 'uniform' knows no time"),
        (costs, {}, "costs are given and no latency"),
        (None, {"latency": 0.5}, "needs to know what each block costs; measure it with python -m benchmarks.blocks"),
        (costs.model_copy(update={"model": "other"}), {"latency": 0.5}, r"on another model \(fingerprint other"),
        (
            costs.model_copy(update={"stacks": [stack.model_copy(update={"path": "block"})]}),
            {"latency": 0.5},
            r"no stack that begins at blocks.0 \(did you mean 'block.0'\?\)",
        ),
        (
            costs.model_copy(update={"stacks": [stack.model_copy(update={"blocks": stack.blocks[:4]})]}),
            {"latency": 0.5},
            "4 blocks of stack blocks, and the analysis 6: they differ at block blocks.4",
        ),
        (
            costs.model_copy(update={"stacks": [stack, stack.model_copy(update={"path": "more"})]}),
            {"latency": 0.5},
            "the costs have a stack at more.0, and the analysis has none there",
        ),
    ]
    for given, options, words in cases:
        with pytest.raises(PpclError, match=words):
            select(analysis, config=RewriteConfig(**options), costs=given)


def test_a_file_of_costs_comes_back_and_a_bad_one_is_refused(tmp_path: Path) -> None:
    costs = random_costs(analysis_of(random_stack(8, 3)), 5)
    path = tmp_path / "costs.json"
    costs.save(path)
    assert Costs.load(path) == costs
    good = path.read_text()
    for old, new in (
        ('"rest": 3.5', '"rest": -1'),
        ('"version": 1', '"version": 2'),
        ('"unit": "ms"', '"unit": "s"'),
        ('"whole"', '"hole"'),
    ):
        path.write_text(good.replace(old, new))
        with pytest.raises(PpclError, match=r"costs\.json"):
            Costs.load(path)
    path.write_text(costs.model_copy(update={"stacks": [*costs.stacks, *costs.stacks]}).model_dump_json())
    with pytest.raises(PpclError, match=r"blocks\.0 is there twice"):
        Costs.load(path)
    with pytest.raises(PpclError, match="no such file"):
        Costs.load(tmp_path / "none.json")
