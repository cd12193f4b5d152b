"""Stages and steps as a user gives them."""

from __future__ import annotations

import pytest

from ppcl_fx.errors import PpclError
from ppcl_fx.train.config import plan_stages


def test_steps_by_position_or_by_name() -> None:
    expected = (("depth", "finetune"), (6, 2))
    assert plan_stages(["depth", "finetune"], [6, 2]) == expected
    assert plan_stages(["depth", "finetune"], {"finetune": 2, "depth": 6}) == expected


@pytest.mark.parametrize(
    ("stages", "steps", "reason"),
    [
        ([], [], "no stage to train"),
        (["dept"], [1], r"unknown stage 'dept' \(did you mean 'depth'\?\)"),
        (["width", "depth"], [1, 1], "out of order or repeated"),
        (["depth", "depth"], [1, 1], "out of order or repeated"),
        (["depth", "width"], [1], "2 stages but 1 numbers of steps"),
        (["depth"], [0], "stage depth has 0 steps"),
        (["depth"], {"depth": 1, "widht": 1}, "steps for 'widht'"),
        (["depth", "width"], {"depth": 1}, "no number of steps for stage width"),
    ],
)
def test_nonsense_is_refused(stages: list[str], steps: list[int] | dict[str, int], reason: str) -> None:
    with pytest.raises(PpclError, match=reason) as caught:
        plan_stages(stages, steps)
    assert "\n" not in str(caught.value)
