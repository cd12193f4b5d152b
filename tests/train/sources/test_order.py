"""Which samples each rank gets: together all, each once, and the same after another number of ranks."""

from __future__ import annotations

import pytest

from ppcl_fx.errors import PpclError
from ppcl_fx.train.data import Batches
from ppcl_fx.train.sources.order import Order
from ppcl_fx.train.sources.skips import Skips
from ppcl_fx.train.sources.source import Source
from tests.models import qwen_kwargs
from tests.train.test_data import _calls

GROUPS = [list(range(7)), list(range(7, 12))]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_share_an_epoch_without_overlap(world: int) -> None:
    ranks = [Order(GROUPS, 2, 0, rank, world) for rank in range(world)]
    one = Order(GROUPS, 2, 0)
    assert len(one) == 4 + 3
    # In turn, the ranks give what one process gives: so nothing is missed and nothing comes twice.
    dealt = [ranks[number % world].indices(number // world) for number in range(3 * len(one))]
    assert dealt == [one.indices(step) for step in range(3 * len(one))]
    for epoch in range(3):
        batches = dealt[epoch * len(one) : (epoch + 1) * len(one)]
        assert sorted(i for batch in batches for i in batch) == list(range(12))


@pytest.mark.parametrize(("before", "after"), [(2, 3), (2, 1), (1, 2), (3, 3)])
def test_it_goes_on_with_another_number_of_ranks(before: int, after: int) -> None:
    one = Order(GROUPS, 2, 0)
    steps = 5  # into the second epoch
    state = Order(GROUPS, 2, 0, 0, before).state(steps)
    ranks = [Order(GROUPS, 2, 0, rank, after) for rank in range(after)]
    for rank in ranks:
        rank.restore(state)
        assert rank.state(steps) == state
    came = [ranks[number % after].indices(steps + number // after) for number in range(12)]
    assert came == [one.indices(step) for step in range(before * steps, before * steps + 12)]


def test_states_of_other_data_are_refused() -> None:
    order = Order(GROUPS, 2, 0)
    for change in ({"seed": 1}, {"position": 7}):
        with pytest.raises(PpclError, match="same data, batch and seed"):
            order.restore({**order.state(0), **change})  # type: ignore[typeddict-item]
    with pytest.raises(PpclError, match="rank 3 of 3"):
        Order(GROUPS, 2, 0, 3, 3)


def test_recorded_calls_are_a_source() -> None:
    calls = _calls([qwen_kwargs(seed=seed) for seed in range(5)])
    ranks = [Batches(calls, 1, 0, rank=rank, world=2) for rank in range(2)]
    assert isinstance(ranks[0], Source)
    assert ranks[0].fingerprint == calls.fingerprint
    drawn = [ranks[number % 2].indices(number // 2) for number in range(5)]
    assert sorted(drawn) == [(0,), (1,), (2,), (3,), (4,)]
    later = Batches(calls, 1, 0)
    later.restore(ranks[0].state(2))
    assert later.indices(2) == drawn[4]


def test_one_corrupt_call_in_a_hundred_is_left_out_and_two_stop(caplog: pytest.LogCaptureFixture) -> None:
    kwargs = [qwen_kwargs(seed=seed, height=2, width=2, text=2) for seed in range(100)]
    kwargs[3]["hidden_states"][0, 0, 0] = float("nan")
    batches = Batches(_calls(kwargs), 50, 0)
    rows = [batches.kwargs(step)["hidden_states"] for step in range(2)]
    assert sum(len(row) for row in rows) == 99 * 2
    assert all(row.isfinite().all() for row in rows)
    batches.kwargs(0), batches.kwargs(1)
    assert list(batches.skips.reasons) == ["call 3"]
    assert sum("call 3 is skipped" in line for line in caplog.messages) == 1
    kwargs[4]["hidden_states"][0, 0, 0] = float("inf")
    with pytest.raises(PpclError, match="2 of 100 samples are corrupt, which is more than 1 %"):
        [batches.kwargs(step) for step in range(2)]


def test_the_limit_is_one_in_a_hundred() -> None:
    skips = Skips("here", 200)
    for name in ("a", "b", "b"):
        skips.add(name, "broken")
    with pytest.raises(PpclError, match=r"^here: 3 of 200 samples .* the last is c: broken; mend or remove them$"):
        skips.add("c", "broken")
