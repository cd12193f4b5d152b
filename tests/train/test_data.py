"""Which calls a step gets: deterministic, each once an epoch, never two that do not belong together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ppcl_fx.calls.store import Call, Calls
from ppcl_fx.errors import PpclError
from ppcl_fx.train.core.batches import Batches, signature
from tests.models import flux_kwargs, qwen_kwargs


def _calls(kwargs: list[dict[str, Any]]) -> Calls:
    return Calls(
        [Call(k, ("a square",), 0.5, index, k["hidden_states"].shape[0]) for index, k in enumerate(kwargs)]
    )


def _qwen(count: int, **sizes: int) -> list[dict[str, Any]]:
    return [qwen_kwargs(seed=seed, **sizes) for seed in range(count)]


def test_the_batch_is_a_function_of_seed_and_step() -> None:
    calls = _calls(_qwen(7))
    first, second = Batches(calls, 2, seed=3), Batches(calls, 2, seed=3)
    forwards = [first.indices(step) for step in range(12)]
    backwards = [second.indices(step) for step in reversed(range(12))][::-1]
    assert forwards == backwards
    assert forwards != [Batches(calls, 2, seed=4).indices(step) for step in range(12)]
    assert forwards[:4] != forwards[4:8]


@pytest.mark.parametrize("batch", [1, 2, 3, 20])
def test_an_epoch_draws_each_call_once(batch: int) -> None:
    batches = Batches(_calls(_qwen(7)), batch, seed=0)
    for epoch in range(3):
        steps = range(epoch * len(batches), (epoch + 1) * len(batches))
        drawn = [index for step in steps for index in batches.indices(step)]
        assert sorted(drawn) == list(range(7))
    assert len(batches) == -(-7 // batch)


def test_only_calls_of_one_kind_come_together() -> None:
    square, tall, long = _qwen(4), _qwen(4, height=8, width=2), _qwen(3, text=7)
    batches = Batches(_calls([*square, *tall, *long]), 3, seed=0)
    kinds = [range(4), range(4, 8), range(8, 11)]
    for step in range(len(batches)):
        indices = batches.indices(step)
        assert any(set(indices) <= set(kind) for kind in kinds)
    assert len(batches) == 2 + 2 + 1


def test_the_same_tokens_in_another_shape_are_another_kind() -> None:
    """Sixteen tokens are 4 x 4 or 8 x 2; rotary positions follow the first sample, so never mix them."""
    square, tall = (Call(qwen_kwargs(height=h, width=w), (), 0.5, 0, 2) for h, w in ((4, 4), (8, 2)))
    assert square.kwargs["hidden_states"].shape == tall.kwargs["hidden_states"].shape
    assert signature(square) != signature(tall)


def test_shared_tensors_and_constants_decide_batched_values_do_not() -> None:
    plain = flux_kwargs(batch=3, seed=1)
    shifted = {**plain, "img_ids": plain["img_ids"] + 1}
    scaled = {**plain, "joint_attention_kwargs": {"scale": 0.5}}
    brighter = {**plain, "hidden_states": plain["hidden_states"] * 2, "guidance": plain["guidance"] + 1}
    lengths = [{**plain, "txt_seq_lens": [5, 4, length]} for length in (3, 2)]
    marks = [signature(Call(k, (), 0.5, 0, 3)) for k in (plain, shifted, scaled, brighter, *lengths)]
    assert marks[0] != marks[1]
    assert marks[0] != marks[2]
    assert marks[0] == marks[3]
    assert marks[4] == marks[5]


def test_a_batch_is_its_calls_joined() -> None:
    kwargs = _qwen(4)
    batches = Batches(_calls(kwargs), 2, seed=0)
    first, second = batches.indices(0)
    joined = batches.kwargs(0)
    expected = torch.cat([kwargs[first]["hidden_states"], kwargs[second]["hidden_states"]])
    assert torch.equal(joined["hidden_states"], expected)
    assert joined["img_shapes"] == [[(1, 4, 4)]] * 4
    assert joined["return_dict"] is False


def test_only_the_calls_main_dtype_is_cast() -> None:
    kwargs = {**flux_kwargs(), "hidden_states": flux_kwargs()["hidden_states"].bfloat16()}
    got = Batches(_calls([kwargs]), 1, seed=0, dtype=torch.float16).kwargs(0)
    assert got["hidden_states"].dtype == torch.float16
    assert got["img_ids"].dtype == torch.float32


def test_nan_is_refused_with_the_call_and_the_argument() -> None:
    kwargs = _qwen(1)
    kwargs[0]["encoder_hidden_states"][0, 0, 0] = float("nan")
    with pytest.raises(PpclError, match=r"call 0: 'encoder_hidden_states' holds NaN"):
        Batches(_calls(kwargs), 1, seed=0).kwargs(0)


def test_no_calls_are_refused() -> None:
    with pytest.raises(PpclError, match="no calls to train on"):
        Batches(_calls([]), 1, seed=0)
