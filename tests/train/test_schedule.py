"""The learning rate, the optimiser's settings, and clipping edit by edit."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from ppcl_fx.train.core.optimizer import clip, factor, make_optimizer, warmup_steps


def test_linear_up_then_half_a_cosine() -> None:
    factors = [factor(step, 200) for step in range(200)]
    assert warmup_steps(200) == 10
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[9 + 191 // 2] == pytest.approx(0.5, abs=0.01)
    assert 0 < factors[-1] < 1e-3


@pytest.mark.parametrize("total", [1, 2, 3, 20])
def test_short_runs_keep_a_positive_rate(total: int) -> None:
    factors = [factor(step, total) for step in range(total)]
    assert factors[0] == 1.0
    assert all(0 < value <= 1 for value in factors)


def test_the_optimizer_is_the_papers() -> None:
    groups = {"a": [Parameter(torch.ones(2))], "b": [Parameter(torch.ones(3))]}
    optimizer = make_optimizer(groups, 1e-3)
    assert type(optimizer) is torch.optim.AdamW
    assert [group["name"] for group in optimizer.param_groups] == ["a", "b"]
    for group in optimizer.param_groups:
        assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.9, 0.95), 0.02, 1e-3)


def test_clipping_one_edit_leaves_the_others() -> None:
    large, small = Parameter(torch.zeros(2)), Parameter(torch.zeros(2))
    large.grad, small.grad = torch.tensor([30.0, 40.0]), torch.tensor([0.3, 0.4])
    norms = clip({"large": [large], "small": [small]}, 1.0)
    assert norms["large"].item() == pytest.approx(50)
    assert norms["small"].item() == pytest.approx(0.5)
    torch.testing.assert_close(large.grad, torch.tensor([0.6, 0.8]))
    assert torch.equal(small.grad, torch.tensor([0.3, 0.4]))


def test_without_a_limit_gradients_stay() -> None:
    parameter = Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([30.0, 40.0])
    assert clip({"a": [parameter]}, None)["a"].item() == pytest.approx(50)
    assert torch.equal(parameter.grad, torch.tensor([30.0, 40.0]))
