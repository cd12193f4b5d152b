"""What the loop does beside a step: accumulation, averages, held-out calls, students that stop, full disks, signals."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import ppcl_fx.io.files
from ppcl_fx.calls.store import Call, Calls
from ppcl_fx.errors import PpclError, Stopped
from ppcl_fx.io.files import check_writable
from ppcl_fx.ir.graphs import module_paths
from ppcl_fx.train import TrainResult, train
from ppcl_fx.train.config import Weights
from ppcl_fx.train.core.batches import split
from ppcl_fx.train.core.distillation_graph import train_only
from ppcl_fx.train.core.stage_trainer import converged
from ppcl_fx.train.core.stages import Distillation, FineTuning
from tests.train.pluggable import build

pytestmark = pytest.mark.slow

NOBODY = 65534


def _run(model: Any, calls: Calls, out: Path, **options: Any) -> TrainResult:
    given = {"stages": ["depth"], "steps": [6], "batch": 1, "lr": 3e-3, "every": 2, "tensorboard": False, **options}
    return train(model, calls, out=out, **given)


def _students(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.students_module.named_parameters()}


def _same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def _spoil(model: Any, edit: str, at: int) -> Any:
    """Make one edit's loss NaN at a step, through a weight of its student that is put back afterwards."""
    train_only(model, "depth")
    parameter = Distillation(model, "depth", Weights()).groups[edit][-1]
    kept = parameter.detach().clone()

    def progress(_stage: str, done: int, _total: int, _loss: float) -> None:
        with torch.no_grad():
            if done == at - 1:
                kept.copy_(parameter)
                parameter.fill_(float("nan"))

    return progress


# Accumulation, averages


def test_two_calls_accumulated_are_two_calls_in_a_batch(tmp_path: Path) -> None:
    (one, calls), (two, _) = build(), build()
    together = _run(one, calls[:2], tmp_path / "one", batch=2, steps=[3])
    apart = _run(two, calls[:2], tmp_path / "two", accumulate=2, steps=[3])
    for edit, curve in together.stages[0].losses.items():
        assert apart.stages[0].losses[edit] == pytest.approx(curve, rel=1e-4)
        assert curve[-1] < curve[0]


def test_the_average_is_the_result_of_every_stage(tmp_path: Path) -> None:
    (plain, calls), (averaged, _) = build(), build()
    before = _students(plain)
    _run(plain, calls, tmp_path / "plain")
    _run(averaged, calls, tmp_path / "averaged", ema=0.9)
    last, mean = _students(plain), _students(averaged)
    moved = [n for n in last if not torch.equal(last[n], before[n])]
    assert moved
    nearer = [(mean[n] - before[n]).norm() < (last[n] - before[n]).norm() for n in moved]
    assert sum(nearer) > 0.9 * len(nearer)


# Held-out calls, students that converge


def _calls(prompts: list[str]) -> Calls:
    return Calls([Call({"x": torch.ones(1)}, (p,), 0.5, i, 1) for i, p in enumerate(prompts)])


def test_the_split_is_deterministic_and_keeps_prompts_together() -> None:
    calls = _calls([f"prompt {i // 3}" for i in range(30)])
    used, held = split(calls, 0.2, seed=1)
    assert (used, held) == split(calls, 0.2, seed=1)
    assert held != split(calls, 0.2, seed=2)[1]
    assert sorted(used + held) == list(range(30))
    assert len(held) == 6
    assert {i // 3 for i in held}.isdisjoint(i // 3 for i in used)
    assert split(calls, 0.0, seed=1) == (list(range(30)), [])
    assert [len(part) for part in split(_calls(["one"] * 5), 0.2, seed=1)] == [4, 1]
    with pytest.raises(PpclError, match="one call cannot be split"):
        split(_calls(["one"]), 0.5, seed=1)


def test_converged_means_no_gain_for_a_while() -> None:
    history = list(enumerate([1.0, 0.9, 0.899, 0.95, 0.898]))
    assert not converged(history, 3 + 1, 0.01)
    assert converged(history, 3, 0.01)
    assert not converged(history, 3, 0.0), "any lower loss is a gain"
    assert not converged([], 1, 0.0)


def test_a_student_that_has_converged_costs_nothing_and_changes_nothing(tmp_path: Path) -> None:
    (plain, calls), (short, _) = build(), build()
    rows: list[Any] = []
    held = {"held_out": 0.2, "evaluate_every": 2, "steps": [8]}
    whole = _run(plain, calls, tmp_path / "plain", **held)
    # Nothing gains half of its loss in two steps: each student stops at the second evaluation.
    result = _run(short, calls, tmp_path / "short", patience=1, min_gain=0.5, watch=rows.append, **held)
    stage = result.stages[0]
    assert {stop.step for stop in stage.stopped.values()} == {4}
    assert stage.steps == 4
    assert stage.held_out == {edit: curve[:2] for edit, curve in whole.stages[0].held_out.items()}
    assert set(rows[-1].stopped) == set(stage.stopped)
    before = _students(short)
    again = _run(short, calls, tmp_path / "short", patience=1, min_gain=0.5, resume=True, **held)
    assert again.stages[0].losses == stage.losses
    assert _same(_students(short), before)
    with pytest.raises(PpclError, match="patience: needs held-out calls"):
        _run(short, calls, tmp_path / "other", patience=1)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_stopped_edits_part_of_the_graph_is_not_run(sequential: bool) -> None:
    model, calls = build()
    train_only(model, "depth")
    stage = Distillation(model, "depth", Weights(), sequential=sequential)
    first, last = stage.groups
    expected = stage.evaluate(calls[0].kwargs)

    def blocks() -> set[str]:
        nodes = stage._distiller(model.graph).gm.graph.nodes
        return {path.split(".attn")[0] for node in nodes for path in module_paths(node)[:1]}

    before, mine = blocks(), stage.groups[last]
    stage.stop(last)
    assert list(stage.groups) == [first]
    assert blocks() < before
    assert not any(p.requires_grad for p in mine)
    assert torch.equal(stage.evaluate(calls[0].kwargs)[first], expected[first])
    assert list(stage.step(calls[0].kwargs)) == [first]
    assert all(p.grad is None for p in mine)


# A loss that is NaN


def test_nan_stops_its_own_interval_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (plain, calls), (spoilt, _) = build(), build()
    whole = _run(plain, calls, tmp_path / "plain")
    bad, good = reversed(list(whole.stages[0].losses))
    result = _run(spoilt, calls, tmp_path / "spoilt", progress=_spoil(spoilt, bad, at=4))
    stage = result.stages[0]
    assert list(stage.stopped) == [bad]
    assert stage.stopped[bad].step == 3
    assert f"step 4: the loss of {bad} is nan (call " in stage.stopped[bad].reason
    assert f"{bad} stopped" in caplog.text
    assert stage.losses[good] == whole.stages[0].losses[good]
    assert stage.losses[bad] == whole.stages[0].losses[bad][:3]
    assert all(bool(torch.isfinite(p).all()) for p in spoilt.parameters())
    json.loads(result.losses.read_text(encoding="utf-8"))


def test_an_update_that_overflows_is_never_saved(tmp_path: Path) -> None:
    """The loss of its step was finite, so only a look at the weights shows it."""
    model, calls = build()
    train_only(model, "depth")
    bad, mine = next(iter(Distillation(model, "depth", Weights()).groups.items()))
    saved: list[list[Tensor]] = []
    steps = itertools.count(1)

    def overflow(*_: Any) -> None:
        if next(steps) == 4:
            with torch.no_grad():
                mine[0].fill_(float("inf"))

    def keep(_stage: str, done: int, _total: int, _loss: float) -> None:
        if done == 2:
            saved.append([p.detach().clone() for p in mine])

    hook = register_optimizer_step_post_hook(overflow)
    try:
        result = _run(model, calls, tmp_path / "run", progress=keep)
    finally:
        hook.remove()
    stopped = result.stages[0].stopped
    assert list(stopped) == [bad]
    assert stopped[bad].step == 3
    assert "not finite; the last checkpoint's weights are kept" in stopped[bad].reason
    assert all(torch.equal(now, then) for now, then in zip(mine, saved[0], strict=True))
    assert len(result.stages[0].losses[bad]) == 4


def test_an_update_that_overflows_before_any_checkpoint_ends_the_run(tmp_path: Path) -> None:
    model, calls = build()

    def overflow(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].fill_(float("inf"))

    hook = register_optimizer_step_post_hook(overflow)
    try:
        with pytest.raises(PpclError, match="step 1: .* not finite; train again with a smaller lr"):
            _run(model, calls, tmp_path / "run", every=1, warmup=0)
    finally:
        hook.remove()
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_where_errors_run_through_the_chain_nan_ends_the_run(tmp_path: Path) -> None:
    model, calls = build()
    bad = model.edits[0]
    with pytest.raises(PpclError, match=r"^stage depth, step 3: .* is nan \(call \d+\); the last checkpoint is good"):
        _run(model, calls, tmp_path, sequential=True, progress=_spoil(model, bad, at=3))


# A full disk, folders without permission


def test_a_full_disk_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (plain, calls), (model, _), (again, _) = build(), build(), build()
    _run(plain, calls, tmp_path / "plain")
    original, full = ppcl_fx.io.files.sync, {"disk": False}

    def sync(path: Path) -> None:
        if full["disk"]:
            raise OSError(28, "No space left on device", str(path))
        original(path)

    def fill(_stage: str, done: int, _total: int, _loss: float) -> None:
        full["disk"] = done >= 3

    monkeypatch.setattr(ppcl_fx.io.files, "sync", sync)
    out = tmp_path / "full"
    with pytest.raises(PpclError, match="No space left on device"):
        _run(model, calls, out, progress=fill)
    assert "training goes on from memory" in caplog.text
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["00-00000002"]
    full["disk"] = False
    _run(again, calls, out, resume=True)
    assert _same(_students(again), _students(plain))


def test_a_log_folder_without_permission_is_found_before_training(tmp_path: Path) -> None:
    model, calls = build()
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    me = os.geteuid()
    try:
        if me == 0:  # root may write anywhere, so another user tries
            os.seteuid(NOBODY)
        with pytest.raises(PpclError, match=r"cannot be written \(Permission denied") as caught:
            check_writable(closed / "logs")
    finally:
        os.seteuid(me)
    assert "\n" not in str(caught.value)
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(PpclError, match=r"file/logs: cannot be written"):
        _run(model, calls, tmp_path / "run", log=str(tmp_path / "file" / "logs"), progress=_never)
    assert not (tmp_path / "run").exists()


def _never(*_: object) -> None:
    raise AssertionError("trained")


# Signals and the clock


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves_with_one_line(number: signal.Signals, code: int, tmp_path: Path) -> None:
    (plain, calls), (model, _), (again, _) = build(), build(), build()
    options = {"ema": 0.9, "every": 100, "accumulate": 2, "held_out": 0.2, "evaluate_every": 2}
    whole = _run(plain, calls, tmp_path / "plain", **options)
    before = signal.getsignal(number)

    def send(_stage: str, done: int, _total: int, _loss: float) -> None:
        if done == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(Stopped, match=r"^stopped by \S+ at stage depth, step 3 of 6; saved, go on") as caught:
        _run(model, calls, tmp_path / "run", progress=send, **options)
    assert caught.value.code == code
    assert signal.getsignal(number) is before
    result = _run(again, calls, tmp_path / "run", resume=True, **options)
    assert _same(_students(again), _students(plain))
    assert result.stages[0].held_out == whole.stages[0].held_out


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (plain, calls), (jumped, _) = build(), build()
    _run(plain, calls, tmp_path / "plain", steps=[2])
    days = itertools.cycle([2e9, 0.0, 1e9])
    monkeypatch.setattr(time, "time", lambda: next(days))
    result = _run(jumped, calls, tmp_path / "jumped", steps=[2])
    assert _same(_students(jumped), _students(plain))
    assert 0 < result.stages[0].seconds < 600


# Compiled students, recorded outputs, the score


# torch's compiler itself looks at the gradients of tensors between blocks, and warns of it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_students_learn_the_same(tmp_path: Path) -> None:
    (plain, calls), (compiled, _) = build(), build()
    options = {"stages": ["depth", "finetune"], "steps": [2, 2]}
    one = _run(plain, calls[:1], tmp_path / "plain", **options)
    torch.compiler.reset()
    two = _run(compiled, calls[:1], tmp_path / "two", compile=True, compile_backend="aot_eager", **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for first, second in zip(one.stages, two.stages, strict=True):
        for edit, curve in first.losses.items():
            assert second.losses[edit] == pytest.approx(curve, rel=1e-3)
    with pytest.raises(PpclError, match="did you mean 'inductor'"):
        _run(compiled, calls, tmp_path / "x", compile=True, compile_backend="inducter")


def test_recorded_outputs_give_the_same_losses_without_a_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = build()
    teacher = FineTuning(model, model.edits)
    recorded = Calls(
        [Call(**{**vars(call), "output": teacher.target(call.kwargs)}) for call in calls], calls.model
    )
    options = {"stages": ["finetune"], "steps": [4], "finetune_lr": 1e-3, "held_out": 0.2, "evaluate_every": 2}
    computed = _run(model, calls, tmp_path / "computed", **options)
    asked: list[int] = []
    original = FineTuning.target

    def counted(self: FineTuning, kwargs: Any) -> Tensor:
        asked.append(1)
        return original(self, kwargs)

    monkeypatch.setattr(FineTuning, "target", counted)
    read = _run(model, recorded, tmp_path / "read", **options)
    assert len(asked) == 1, "only the comparison asks the teacher"
    assert read.stages[0].losses == computed.stages[0].losses
    assert read.stages[0].held_out == computed.stages[0].held_out
    for call in recorded:
        assert call.output is not None
        call.output.add_(1e-3)
    other = _run(model, Calls(list(recorded), calls.model), tmp_path / "other", **options)
    assert len(asked) > 4, "other outputs than the teacher's are not used"
    assert other.stages[0].losses == computed.stages[0].losses


def test_the_score_is_asked_at_each_evaluation(tmp_path: Path) -> None:
    model, calls = build()
    plugged = list(model.students)
    seen: list[tuple[str, int]] = []

    def score(stage: str, whole: nn.Module) -> float:
        assert not torch.is_grad_enabled()
        seen.append((stage, sum(p.numel() for p in whole.parameters())))
        return len(seen) / 10

    options = {"stages": ["depth", "finetune"], "steps": [4, 2], "evaluate_every": 2}
    result = _run(model, calls, tmp_path, score=score, **options)
    assert [name for name, _ in seen] == ["depth", "depth", "finetune"]
    assert result.stages[0].scores == [(2, 0.1), (4, 0.2)]
    assert list(model.students) == plugged

