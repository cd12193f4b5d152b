"""The 8-bit AdamW of bitsandbytes: it trains, its averages take a quarter, and a killed run goes on to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from ppcl_fx.calls.store import Calls
from ppcl_fx.errors import PpclError
from ppcl_fx.io.files import read_safetensors
from ppcl_fx.train import TrainResult, train
from ppcl_fx.train.core import optimizer
from tests.train.pluggable import build


def _run(model: Any, calls: Calls, out: Path, **options: Any) -> TrainResult:
    given = {"stages": ["depth"], "steps": [6], "batch": 1, "lr": 3e-3, "every": 2, "tensorboard": False, **options}
    return train(model, calls, out=out, optimizer="adamw8bit", **given)


def _students(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.students_module.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_trains_and_resumes_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    (plain, calls), (killed, _), (again, _) = (build(dtype=dtype) for _ in range(3))
    whole = _run(plain, calls[:1], tmp_path / "plain")
    for curve in whole.stages[0].losses.values():
        assert curve[-1] < 0.9 * curve[0]

    def kill(_stage: str, done: int, _total: int, _loss: float) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run(killed, calls[:1], tmp_path / "run", progress=kill)
    saved = read_safetensors(tmp_path / "run" / "checkpoints" / "00-00000002" / "state.safetensors")
    kinds = {name.split(".", 2)[2] for name in saved if name.startswith("optimizer.")}
    assert kinds == {"step:int", "state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2"}
    assert {saved[name].dtype for name in saved if name.endswith(".qmap1")} == {torch.float32}
    assert any(saved[name].dtype == torch.uint8 for name in saved if name.endswith(".state1"))
    result = _run(again, calls[:1], tmp_path / "run", resume=True)
    assert result.stages[0].losses == whole.stages[0].losses
    found, expected = _students(again), _students(plain)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def _averages(kind: str, size: int) -> int:
    """Bytes of what AdamW keeps for one parameter after a step, the step's number and the shared map left out."""
    parameter = Parameter(torch.linspace(-1, 1, size))
    parameter.grad = torch.ones(size)
    made = optimizer.make_optimizer({"one": [parameter]}, 1e-3, kind=kind)
    made.step()
    names = ("step", "qmap1", "qmap2")
    return sum(value.nbytes for name, value in made.state[parameter].items() if name not in names)


def test_the_averages_take_a_quarter() -> None:
    size = 2**16
    assert _averages("adamw", size) == 8 * size
    # Two bytes a value, and two float32 scales for each 256 values.
    assert _averages("adamw8bit", size) == 2 * size + 2 * 4 * size // 256
    assert _averages("adamw8bit", 64) == 8 * 64, "small parameters keep float32"


def test_where_it_cannot_do_a_step_one_line_says_so_before_training() -> None:
    optimizer.try_eight_bit(torch.device("cpu"))
    said = r"adamw8bit does not run on meta with bitsandbytes \d.*; take adamw$"
    with pytest.raises(PpclError, match=said) as caught:
        optimizer.try_eight_bit(torch.device("meta"))
    assert "\n" not in str(caught.value)


def test_without_bitsandbytes_asking_for_it_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = build()
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(PpclError, match=r"adamw8bit needs bitsandbytes.*pip install 'ppcl-fx\[bnb\]'"):
        _run(model, calls, tmp_path / "run")
    assert not (tmp_path / "run").exists()
