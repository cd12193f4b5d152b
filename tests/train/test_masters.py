"""Masters: 16-bit weights learn by steps smaller than their rounding, float32 ones are left alone."""

from __future__ import annotations

import torch
from torch.nn import Parameter

from ppcl_fx.train.core.checkpoints import set_tensors
from ppcl_fx.train.core.optimizer import MasterWeights, make_optimizer


def _steps(masters: MasterWeights, parameter: Parameter, count: int) -> None:
    optimizer = make_optimizer(masters.groups, 1e-4)
    for _ in range(count):
        parameter.grad = torch.ones_like(parameter)
        masters.take_gradients()
        optimizer.step()
        masters.write_back()


def test_small_steps_add_up() -> None:
    """One step of 1e-4 from 1 is less than half of bfloat16's 2^-8 below 1, forty are not."""
    parameter = Parameter(torch.ones(3, dtype=torch.bfloat16))
    masters = MasterWeights({"e": [parameter]})
    _steps(masters, parameter, 1)
    assert torch.equal(parameter, torch.ones(3, dtype=torch.bfloat16))
    assert parameter.grad is None
    _steps(masters, parameter, 40)
    assert bool((parameter < 1).all())
    assert torch.equal(parameter, masters.groups["e"][0].bfloat16())


def test_float32_parameters_are_their_own_masters() -> None:
    parameter = Parameter(torch.ones(3))
    masters = MasterWeights({"e": [parameter]})
    assert masters.groups["e"][0] is parameter
    assert masters.tensors() == {}


def test_masters_come_back() -> None:
    parameter = Parameter(torch.ones(3, dtype=torch.bfloat16))
    masters = MasterWeights({"e": [parameter]})
    _steps(masters, parameter, 3)
    again = MasterWeights({"e": [Parameter(torch.ones(3, dtype=torch.bfloat16))]})
    set_tensors(again.tensors(), {name: tensor.clone() for name, tensor in masters.tensors().items()})
    assert torch.equal(again.groups["e"][0], masters.groups["e"][0])
