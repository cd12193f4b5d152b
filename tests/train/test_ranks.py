"""Training on two and on three ranks: the losses of one process, checkpoints for any number of ranks, a lost rank."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ppcl_fx.errors import Stopped
from ppcl_fx.train.core import checkpoints
from ppcl_fx.train.distributed.edit_parallel import EditParallel
from tests.train.world import result, start, trained

# Some builds of torch leave torch.distributed out; there are no ranks then.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
]


HELD_OUT: dict[str, Any] = {"held_out": 0.2, "evaluate_every": 2}


def two_ranks(folder: Path, rank: int) -> dict[str, Any]:
    """Train to the end; then again, and rank 1 gets SIGTERM in the first step; go on, and it is killed."""
    torch.save(trained(folder / "two", **HELD_OUT), folder / f"whole-{rank}.pt")
    if rank == 1:
        _at_each_step(lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        trained(folder / "killed", **HELD_OUT)
    except Stopped as stopped:
        (folder / f"stopped-{rank}").write_text(f"{stopped.code} {stopped}")

    def killed() -> None:
        if (folder / "killed" / "checkpoints" / "00-00000002").is_dir():
            os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1:
        _at_each_step(killed)
    return trained(folder / "killed", resume=True, **HELD_OUT)


_STEP = EditParallel.step


def _at_each_step(act: Callable[[], None]) -> None:
    """Have `act` called before each step of distillation on this rank."""

    def spied(self: EditParallel, *args: Any, **kwargs: Any) -> Any:
        act()
        return _STEP(self, *args, **kwargs)

    EditParallel.step = spied  # type: ignore[method-assign]


def three_ranks(folder: Path, rank: int) -> dict[str, Any]:
    """Go on with what two ranks, and one process, began."""
    return {
        name: trained(folder / name, resume=True, checkpointing=True, **HELD_OUT) for name in ("depth-3", "tuning-3")
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, two ranks, and all the ways to go on from two and one on three."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(trained(folder / "one", **HELD_OUT), folder / "one.pt")
    ends = start(2, two_ranks, folder)
    torch.save(ends, folder / "ends.pt")
    for name in ("depth-1", "depth-3"):
        shutil.copytree(folder / "killed", folder / name)
    for name in ("tuning-1", "tuning-3"):
        shutil.copytree(folder / "two", folder / name)
        shutil.rmtree(folder / name / "checkpoints" / "02-00000004")
        shutil.rmtree(folder / name / "finetuned")
    assert start(3, three_ranks, folder) == [(0, "")] * 3
    return folder


def _same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["curves"].keys() == expected["curves"].keys()
    for stage, curves in expected["curves"].items():
        assert found["curves"][stage].keys() == curves.keys()
        for edit, curve in curves.items():
            assert found["curves"][stage][edit] == pytest.approx(curve, rel=1e-6)
    for stage, held in expected["held_out"].items():
        for edit, points in held.items():
            assert [step for step, _ in found["held_out"][stage][edit]] == [step for step, _ in points]
            values = [loss for _, loss in found["held_out"][stage][edit]]
            assert values == pytest.approx([loss for _, loss in points], rel=1e-6)
    for name, tensor in expected["students"].items():
        assert torch.equal(found["students"][name], tensor), name
    if found["tuned"] is not None:
        for name, tensor in expected["tuned"].items():
            # AdamW divides by the gradient's size: where that is all rounding, so is the step.
            torch.testing.assert_close(found["tuned"][name], tensor, rtol=1e-4, atol=2e-5)


def test_two_ranks_give_what_one_process_gives(runs: Path) -> None:
    expected = torch.load(runs / "one.pt", weights_only=True)
    for rank in range(2):
        found = torch.load(runs / f"whole-{rank}.pt", weights_only=True)
        _same(found, expected)
        assert (found["tuned"] is None) == (rank > 0), "rank 0 has the fine-tuned model"
    assert (runs / "two" / "losses.json").read_bytes()
    assert sorted(p.name for p in (runs / "two" / "finetuned").iterdir()) == ["finetuned.json", "model.safetensors"]


def test_the_other_ranks_of_a_killed_one_stop_with_a_line(runs: Path) -> None:
    (first, line), (second, silent) = torch.load(runs / "ends.pt", weights_only=True)
    assert (first, second) == (2, -signal.SIGKILL)
    assert line.startswith("rank 0: another rank is lost or does not answer (")
    assert line.endswith("the last checkpoint is good, start again with --resume")
    assert "\n" not in line
    assert silent == ""


def test_a_signal_to_one_rank_stops_all_at_the_same_step(runs: Path) -> None:
    for rank in range(2):
        line = (runs / f"stopped-{rank}").read_text()
        assert line.startswith("143 stopped by SIGTERM at stage depth, step 1 of 4; saved")


@pytest.mark.parametrize("name", ["depth-3", "tuning-3"])
def test_three_ranks_go_on_from_two(name: str, runs: Path) -> None:
    expected = torch.load(runs / "one.pt", weights_only=True)
    for rank in range(3):
        _same(result(runs, three_ranks, 3, rank)[name], expected)


@pytest.mark.parametrize("name", ["depth-1", "tuning-1"])
def test_one_process_goes_on_from_two_ranks(name: str, runs: Path) -> None:
    found = trained(runs / name, resume=True, **HELD_OUT)
    _same(found, torch.load(runs / "one.pt", weights_only=True))


def test_a_changed_piece_is_found_and_the_checkpoint_before_is_taken(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(runs / "two" / "checkpoints", folder)
    newest = checkpoints.existing(folder)[-1]
    state = checkpoints.peek(folder)
    assert state is not None
    assert state.ended
    piece = sorted((newest / "tensors").iterdir())[-1]
    data = bytearray(piece.read_bytes())
    data[-1] ^= 1
    piece.write_bytes(data)
    found = checkpoints.latest(folder, state.identity)
    assert found is not None
    assert found.state.step == 2
    assert "was changed after it was written" in caplog.text
    piece.write_bytes(data[:-8])
    checkpoints.latest(folder, state.identity)
    assert "truncated" in caplog.text
