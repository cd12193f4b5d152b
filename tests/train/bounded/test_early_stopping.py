"""Options that memory-bounded training shares with the ordinary one: the same numbers to the bit, and what has
converged costs nothing any more.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

from ppcl_fx.calls.store import Calls
from ppcl_fx.errors import PpclError
from ppcl_fx.ir.executor import Executor
from ppcl_fx.model.pluggable import STUDENTS
from ppcl_fx.train import StageCurves, train
from ppcl_fx.train.bounded.trainer import BoundedResult
from ppcl_fx.train.core.stage_trainer import StageTrainer
from tests.train.bounded.test_trainer import _Killed, kill_at, prepared, run, save
from tests.train.pluggable import build

pytestmark = pytest.mark.slow

FIRST, SECOND = "depth:transformer_blocks.0-1", "depth:transformer_blocks.2-3"
# The second student gains less than 11 % from step 2 to 4, the first one from step 4 to 6.
STOPPING: dict[str, Any] = {
    "batch": 1, "held_out": 0.4, "evaluate_every": 2, "patience": 1, "min_gain": 0.11, "lr": 3e-3,
}  # fmt: skip
EIGHT_BIT: dict[str, Any] = {"optimizer": "adamw8bit"}


def said(stage: StageCurves) -> dict[str, Any]:
    """What must be equal of a stage's curves."""
    return stage.model_dump(include={"steps", "losses", "held_out", "stopped"})


@dataclass
class Ordinary:
    """A folder before training, and what the ordinary loop makes of it with students that stop."""

    folder: Path
    calls: Calls
    stages: tuple[StageCurves, ...]
    students: dict[str, torch.Tensor]

    def copy(self, to: Path) -> Path:
        return Path(shutil.copytree(self.folder, to))

    def check(self, folder: Path, result: BoundedResult) -> None:
        """The bounded run's curves and students are these, to the bit."""
        assert [said(stage) for stage in result.stages] == [said(stage) for stage in self.stages]
        found = load_file(folder / STUDENTS)
        assert found and all(torch.equal(tensor, self.students[name]) for name, tensor in found.items())


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Ordinary:
    place = tmp_path_factory.mktemp("ordinary")
    folder, calls = save("qwen", place / "student")
    model, _ = build()
    done = train(model, calls, stages=["depth", "width"], steps=[8, 6], out=place / "plain", **STOPPING)
    students = {name: tensor.detach().clone() for name, tensor in model.graph.state_dict().items()}
    return Ordinary(folder, calls, done.stages, students)


def test_students_stop_as_in_the_ordinary_loop_and_cost_no_step_any_more(
    ordinary: Ordinary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ppcl_fx.train")
    stepped: list[str] = []
    step = StageTrainer.step

    def counted(self: Any) -> Any:
        stepped.append(self.stage.problem.edit)
        return step(self)

    monkeypatch.setattr(StageTrainer, "step", counted)
    folder = ordinary.copy(tmp_path / "student")
    result = run(folder, ordinary.calls, steps=(8, 6), **STOPPING)
    ordinary.check(folder, result)
    depth = result.stages[0]
    assert {edit: (stop.step, stop.kind) for edit, stop in depth.stopped.items()} == {
        SECOND: (4, "converged"),
        FIRST: (6, "converged"),
    }
    assert (depth.steps, stepped.count(FIRST), stepped.count(SECOND)) == (6, 6, 4)
    assert result.stopped is not None and "has converged" in result.stopped[SECOND]
    assert f"{SECOND} stopped, step 4: held-out loss" in caplog.text


def limits(ordinary: Ordinary, name: str) -> dict[str, Any]:
    """Return options under which both students train at a time, from a cache or with the teacher run at every step."""
    if name == "cached":
        return {"every": 2}
    plan = prepared(ordinary.folder, ordinary.calls, steps=(8, 6), **STOPPING).schedules[0]
    border = sum({name: size for cost in plan.costs for name, size in cost.border.items()}.values())
    # On disk no room for a cache or checkpoints, in memory room for a call to train on and two to evaluate on.
    disk = sum(2 * cost.weights for cost in plan.costs)
    return {"disk": disk, "cache_memory": int(3.25 * border), "every": 100}


@pytest.mark.parametrize("name", ["cached", "recomputed"])
def test_a_killed_run_stops_the_same_students_at_the_same_steps(
    name: str, ordinary: Ordinary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = [0]
    run_sweep = Executor.run

    def counted(self: Any, sweep: range, *args: Any, **more: Any) -> Any:
        last[-1] = max(last[-1], sweep.start)
        return run_sweep(self, sweep, *args, **more)

    monkeypatch.setattr(Executor, "run", counted)

    kill = kill_at("depth", 5)

    def report(done: int, total: int, words: str) -> None:
        kill(done, total, words)
        if words.startswith("depth"):
            last.append(0)

    folder = ordinary.copy(tmp_path / "student")
    options = {**STOPPING, **limits(ordinary, name), "steps": (8, 6), "resume": True}
    told: list[str] = []
    with pytest.raises(_Killed):
        run(folder, ordinary.calls, report=report, tell=told.append, **options)
    assert told[0].endswith("2 at a time") and told[1].startswith(f"  {name}: "), told
    if name == "recomputed":
        assert max(last[:4]) > max(last[4:]) > 0, "the teacher runs no further than the last student that trains"
    # The second student has stopped at step 4 and is finished; the first goes on from its checkpoint, or begins again.
    assert [path.name for path in (folder / "bounded" / "done").glob("*.json")] == ["depth-001.json"]
    ordinary.check(folder, run(folder, ordinary.calls, **options))


@pytest.mark.parametrize(
    "options",
    [
        {
            "accumulate": 2, "warmup": 2, "betas": (0.8, 0.9), "weight_decay": 0.1,
            "ema": 0.9, "held_out": 0.4, "evaluate_every": 3,
        },
        EIGHT_BIT,
    ],
)  # fmt: skip
def test_options_mean_what_they_mean_in_the_ordinary_loop(options: dict[str, Any], tmp_path: Path) -> None:
    folder, calls = save("qwen", tmp_path / "student")
    model, _ = build()
    given = {"batch": 1, "lr": 3e-3, **options}
    expected = train(model, calls, stages=["depth"], steps=[4], out=tmp_path / "plain", **given)
    how = {**given, "stages": ("depth",), "steps": (4,), "every": 2, "resume": True}
    with pytest.raises(_Killed):
        run(folder, calls, report=kill_at("depth", 3), **how)
    result = run(folder, calls, **how)
    assert said(result.stages[0]) == said(expected.stages[0])
    state = model.graph.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in load_file(folder / STUDENTS).items())


def test_patience_needs_held_out_calls(ordinary: Ordinary) -> None:
    with pytest.raises(PpclError, match="patience: needs held-out calls to see a gain; give held_out a share"):
        run(ordinary.folder, ordinary.calls, patience=2)
    assert not (ordinary.folder / "bounded").exists()


@pytest.mark.parametrize("every", [1, 100])
def test_an_update_that_overflows_leaves_the_weights_of_the_beginning(
    every: int, ordinary: Ordinary, tmp_path: Path
) -> None:
    """With a checkpoint due it is seen before it is saved, without one by the next step's loss."""
    folder = ordinary.copy(tmp_path / "student")
    before = load_file(folder / STUDENTS)

    def overflow(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].fill_(float("inf"))

    hook = register_optimizer_step_post_hook(overflow)
    try:
        result = run(folder, ordinary.calls, stages=("depth",), steps=(3,), batch=1, every=every)
    finally:
        hook.remove()
    assert result.stopped is not None and set(result.stopped) == {FIRST, SECOND}
    expected = "step 1: the update left weights" if every == 1 else "step 2: the loss"
    assert all(reason.startswith(expected) for reason in result.stopped.values())
    found = load_file(folder / STUDENTS)
    assert found and all(torch.equal(found[name], before[name]) for name in before)
