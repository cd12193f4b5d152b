"""Checkpoints: whole or not there, two of them, only for the run they belong to."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from ppcl_fx.errors import PpclError
from ppcl_fx.schema.curves import StageCurves
from ppcl_fx.train.core import checkpoints
from ppcl_fx.train.core.checkpoints import RunIdentity, State
from ppcl_fx.train.core.optimizer import make_optimizer

IDENTITY = RunIdentity(plan="p", calls="c", options={"lr": 0.1, "steps": [10, 10]})


def _save(folder: Path, stage: int, step: int, value: float | None = None) -> Path:
    curves = [StageCurves(name="depth", label="depth", steps=2, losses={"e": [0.1, 0.3]})]
    tensors = {"students.w": torch.full((3,), step if value is None else value)}
    return checkpoints.save(folder, State(identity=IDENTITY, stage=stage, step=step, curves=curves), tensors)


def test_the_last_two_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    for stage, step in ((0, 9), (0, 10), (1, 5)):
        _save(tmp_path, stage, step)
    assert [path.name for path in checkpoints.existing(tmp_path)] == ["00-00000010", "01-00000005"]
    found = checkpoints.latest(tmp_path, IDENTITY)
    assert found is not None
    assert (found.state.stage, found.state.step) == (1, 5)
    assert torch.equal(found.tensors["students.w"], torch.full((3,), 5.0))
    assert found.state.curves[0].losses == {"e": [0.1, 0.3]}
    assert sorted(path.name for path in found.folder.iterdir()) == ["SHA256SUMS", "state.json", "state.safetensors"]


def test_a_truncated_one_is_passed_over_for_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _save(tmp_path, 0, 1)
    file = _save(tmp_path, 0, 2) / checkpoints.TENSORS
    file.write_bytes(file.read_bytes()[:-4])
    with caplog.at_level(logging.WARNING):
        found = checkpoints.latest(tmp_path, IDENTITY)
    assert found is not None
    assert found.state.step == 1
    assert "damaged checkpoint passed over" in caplog.text and "00-00000002" in caplog.text
    assert "00-00000002" in caplog.text


@pytest.mark.parametrize("damage", ["tensors cut", "tensors gone", "json cut", "json not ours"])
def test_when_none_is_whole_it_says_so(tmp_path: Path, damage: str) -> None:
    folder = _save(tmp_path, 0, 1)
    tensors, state = folder / checkpoints.TENSORS, folder / checkpoints.STATE
    if damage == "tensors cut":
        tensors.write_bytes(tensors.read_bytes()[:20])
    elif damage == "tensors gone":
        tensors.unlink()
    elif damage == "json cut":
        state.write_text(state.read_text()[:50])
    else:
        state.write_text("{}")
    with pytest.raises(PpclError, match="no whole checkpoint is left") as caught:
        checkpoints.latest(tmp_path, IDENTITY)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"plan": "q"}, "of another plan or model"),
        ({"calls": "d"}, "on other calls"),
        ({"options": {"lr": 0.2, "steps": [10, 10]}}, r"with lr 0\.1, not 0\.2"),
    ],
)
def test_another_runs_checkpoint_is_refused(tmp_path: Path, other: dict[str, object], reason: str) -> None:
    _save(tmp_path, 0, 1)
    with pytest.raises(PpclError, match=reason):
        checkpoints.latest(tmp_path, IDENTITY.model_copy(update=other))


def test_a_half_written_one_is_not_seen_and_cleared(tmp_path: Path) -> None:
    (tmp_path / ".00-00000002.partial-12345678").mkdir()
    (tmp_path / "notes").mkdir()
    assert checkpoints.latest(tmp_path, IDENTITY) is None
    _save(tmp_path, 0, 1)
    checkpoints.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_one_changed_byte_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The file still reads, and the loss in it is a number: only the checksum knows."""
    for name in (checkpoints.TENSORS, checkpoints.STATE):
        _save(tmp_path, 0, 1)
        file = _save(tmp_path, 0, 2) / name
        data = bytearray(file.read_bytes())
        place = len(data) - 1 if name == checkpoints.TENSORS else data.index(b"0.3") + 2
        data[place] ^= 1
        file.write_bytes(data)
        found = checkpoints.latest(tmp_path, IDENTITY)
        assert found is not None
        assert found.state.step == 1
        assert f"00-00000002/{name}: its checksum" in caplog.text
        checkpoints.clear(tmp_path)


def test_what_a_fallback_left_behind_goes_with_the_next_checkpoint(tmp_path: Path) -> None:
    for step in (3, 6, 9):
        _save(tmp_path, 0, step)
    _save(tmp_path, 0, 7)
    assert [path.name for path in checkpoints.existing(tmp_path)] == ["00-00000006", "00-00000007"]


def test_a_failing_write_leaves_nothing(tmp_path: Path) -> None:
    _save(tmp_path, 0, 1)
    with pytest.raises(AttributeError):
        checkpoints.save(tmp_path, State(identity=IDENTITY, stage=0, step=2, curves=[]), {"w": "no tensor"})  # type: ignore[dict-item]
    assert [path.name for path in tmp_path.iterdir()] == ["00-00000001"]


def test_ended_is_the_last_step_of_the_last_stage(tmp_path: Path) -> None:
    for stage, step, ended in ((0, 10, False), (1, 9, False), (1, 10, True)):
        _save(tmp_path, stage, step)
        state = checkpoints.peek(tmp_path)
        assert state is not None
        assert state.ended is ended


def _train(optimizer: torch.optim.Optimizer, parameter: Tensor, steps: int) -> None:
    for _ in range(steps):
        parameter.grad = torch.cos(parameter.detach() * 3)
        optimizer.step()


def test_the_optimizer_goes_on_to_the_bit(tmp_path: Path) -> None:
    straight = Parameter(torch.linspace(0, 1, 5))
    _train(make_optimizer({"e": [straight]}, 0.1), straight, 6)

    half = Parameter(torch.linspace(0, 1, 5))
    optimizer = make_optimizer({"e": [half]}, 0.1)
    _train(optimizer, half, 3)
    state = checkpoints.optimizer_state(optimizer)
    assert sorted(state) == ["optimizer.0.exp_avg", "optimizer.0.exp_avg_sq", "optimizer.0.step"]
    checkpoints.save(tmp_path, State(identity=IDENTITY, stage=0, step=3, curves=[]), {"w": half, **state})

    found = checkpoints.latest(tmp_path, IDENTITY)
    assert found is not None
    again = Parameter(found.tensors["w"].clone())
    optimizer = make_optimizer({"e": [again]}, 0.1)
    checkpoints.load_optimizer_state(optimizer, found.tensors)
    _train(optimizer, again, 3)
    assert torch.equal(again, straight)


def test_random_states_come_back() -> None:
    with torch.random.fork_rng(devices=[]):
        state = checkpoints.rng_state(torch.device("cpu"))
        drawn = torch.rand(3)
        checkpoints.set_rng_state(state, torch.device("cpu"))
        assert torch.equal(torch.rand(3), drawn)
