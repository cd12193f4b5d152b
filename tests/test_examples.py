"""The saved shapes of a call give back a call of the same shapes, and damaged ones an error."""

from __future__ import annotations

import json

import pytest
import torch

from ppcl_fx.calls.examples import build, describe
from ppcl_fx.errors import PpclError


def test_a_dict_keeps_its_keys_whatever_their_type() -> None:
    call = {"cache": {0: {"full": torch.zeros(2, 3)}, 1: {"full": torch.zeros(2, 4)}}, "flag": {"chunks": 2}}
    again = build(json.loads(json.dumps(describe(call))))
    assert again["flag"] == {"chunks": 2}
    assert list(again["cache"]) == [0, 1]
    assert [again["cache"][i]["full"].shape for i in range(2)] == [(2, 3), (2, 4)]
    assert again["cache"][0]["full"].is_meta


@pytest.mark.parametrize("pairs", [[1], [[{"value": 0}]], [[{"list": []}, {"value": 0}]]])
def test_pairs_that_are_none_are_refused(pairs: list[object]) -> None:
    with pytest.raises(PpclError, match="unknown entry 'pairs'; save the model again"):
        build({"pairs": pairs})  # type: ignore[dict-item]


def test_a_call_that_json_cannot_hold_is_refused() -> None:
    with pytest.raises(PpclError, match="an argument of type object cannot be saved"):
        describe({"cache": object()})
