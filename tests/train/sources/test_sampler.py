"""In which order samples come: each once an epoch, and the same from wherever it goes on."""

from __future__ import annotations

import pytest

from ppcl_fx.errors import PpclError
from ppcl_fx.train.core.batches import Batches
from ppcl_fx.train.data.source import BadSamples, DataSource, Sampler
from tests.models import qwen_kwargs
from tests.train.test_data import _calls

GROUPS = [list(range(7)), list(range(7, 12))]


def test_an_epoch_holds_each_sample_once() -> None:
    order = Sampler(GROUPS, 2, 0)
    assert len(order) == 4 + 3
    dealt = [order.indices(step) for step in range(3 * len(order))]
    for epoch in range(3):
        batches = dealt[epoch * len(order) : (epoch + 1) * len(order)]
        assert sorted(i for batch in batches for i in batch) == list(range(12))
    assert dealt[: len(order)] != dealt[len(order) : 2 * len(order)]


def test_it_goes_on_from_a_state() -> None:
    steps = 9  # into the second epoch
    state = Sampler(GROUPS, 2, 0).state(steps)
    assert (state["epoch"], state["position"]) == (1, 2)
    later = Sampler(GROUPS, 2, 0)
    later.restore(state)
    assert later.state(steps) == state
    assert later.indices(steps) == Sampler(GROUPS, 2, 0).indices(steps)


def test_states_of_other_data_are_refused() -> None:
    order = Sampler(GROUPS, 2, 0)
    for change in ({"seed": 1}, {"position": 7}):
        with pytest.raises(PpclError, match="same data, batch and seed"):
            order.restore({**order.state(0), **change})  # type: ignore[typeddict-item]


def test_recorded_calls_are_a_source() -> None:
    calls = _calls([qwen_kwargs(seed=seed) for seed in range(5)])
    batches = Batches(calls, 1, 0)
    assert isinstance(batches, DataSource)
    assert batches.fingerprint == calls.fingerprint
    drawn = [batches.indices(step) for step in range(5)]
    assert sorted(drawn) == [(0,), (1,), (2,), (3,), (4,)]
    later = Batches(calls, 1, 0)
    later.restore(batches.state(2))
    assert later.indices(2) == drawn[2]


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
    skips = BadSamples("here", 200)
    for name in ("a", "b", "b"):
        skips.add(name, "broken")
    with pytest.raises(PpclError, match=r"^here: 3 of 200 samples .* the last is c: broken; mend or remove them$"):
        skips.add("c", "broken")
