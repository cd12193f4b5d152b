"""Memory-bounded training: the losses of the in-memory training, within limits, and a killed run goes on to the bit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ppcl_fx
from ppcl_fx.calls.store import Calls
from ppcl_fx.errors import PpclError
from ppcl_fx.model.pluggable import STUDENTS
from ppcl_fx.train import Losses, train
from ppcl_fx.train.bounded import stage, teacher
from ppcl_fx.train.bounded.costs import Speeds
from ppcl_fx.train.bounded.schedule import MARGIN
from ppcl_fx.train.bounded.trainer import BoundedResult, BoundedTraining
from ppcl_fx.train.config import Limits, TrainConfig, Weights
from ppcl_fx.train.core.stage_trainer import StageTrainer
from tests.train.pluggable import build

pytestmark = pytest.mark.slow

FAST_DISK = Speeds(flops=1e6, read=1e12, write=1e12)
"""Computing is dear here and the disk is for nothing: everything is cached."""
STEPS = {"depth": 4, "width": 3}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Calls]:
    return save("qwen", tmp_path / "student")


def save(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Calls]:
    model, calls = build(kind, dtype)
    model.plug(students=model.edits).save(folder)
    return folder, calls


def prepared(folder: Path, calls: Calls, **more: Any) -> BoundedTraining:
    """Return a training; limits and options by name, everything cached unless limits say otherwise."""
    own = {key: more.pop(key) for key in list(more) if key in TrainConfig.model_fields}
    limits = Limits(**{key: more.pop(key) for key in list(more) if key in Limits.model_fields})
    config = TrainConfig(
        **{"stages": tuple(STEPS), "steps": tuple(STEPS.values()), "lr": 3e-3, "batch": 2, **own}
    )
    return BoundedTraining(folder, calls, config, limits, **{"speeds": FAST_DISK, **more})


def run(
    folder: Path,
    calls: Calls,
    report: Callable[[int, int, str], None] = lambda *_: None,
    tell: Callable[[str], None] = lambda line: None,
    **more: Any,
) -> BoundedResult:
    training = prepared(folder, calls, **more)
    for line in () if training.ended else training.lines:
        tell(line)
    return training.run(report)


def curves(result: Any) -> dict[str, dict[str, list[float]]]:
    return {stage.label: stage.losses for stage in result.stages}


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], int]:
    """Returns a limit that leaves so many bytes: what the process holds is taken to be nothing."""
    monkeypatch.setattr(stage, "anonymous", lambda: 0)
    monkeypatch.setattr(teacher, "anonymous", lambda: 0)
    return lambda size: MARGIN + size


@pytest.mark.parametrize("kind", ["qwen", "flux", "sd3"])
def test_losses_and_students_are_those_of_the_in_memory_training(kind: str, tmp_path: Path) -> None:
    folder, calls = save(kind, tmp_path / "student")
    model, _ = build(kind)
    expected = train(model, calls, stages=list(STEPS), steps=STEPS, out=tmp_path / "plain", batch=2, lr=3e-3)
    before = load_file(folder / STUDENTS)
    result = run(folder, calls)
    for label, losses in curves(expected).items():
        assert curves(result)[label].keys() == losses.keys()
        for edit, values in losses.items():
            assert curves(result)[label][edit] == pytest.approx(values, rel=1e-6, abs=1e-6)
    found, plain = load_file(folder / STUDENTS), model.graph.state_dict()
    assert found.keys() == before.keys()
    assert any(not torch.equal(found[name], before[name]) for name in found)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, plain[name], rtol=0, atol=2e-5)
    loaded = ppcl_fx.load(folder)
    assert loaded(**calls[0].kwargs)[0].isfinite().all()
    assert Losses.open(folder / "losses.json").stages == list(result.stages)
    assert [path.name for path in (folder / "bounded").iterdir()] == ["run.json"]


def test_batches_of_one_call_are_equal_to_the_bit(saved: tuple[Path, Calls], tmp_path: Path) -> None:
    """With nothing to add up over a batch the same operations run on the same values."""
    folder, calls = saved
    model, _ = build()
    expected = train(model, calls, stages=["depth"], steps=[4], out=tmp_path / "plain", batch=1, lr=3e-3)
    result = run(folder, calls, stages=("depth",), steps=(4,), batch=1)
    assert curves(result) == curves(expected)
    state = model.graph.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in load_file(folder / STUDENTS).items())


@dataclass
class Straight:
    """A folder before training, and what an undisturbed run makes of it."""

    folder: Path
    calls: Calls
    result: BoundedResult
    students: dict[str, torch.Tensor]

    def copy(self, to: Path) -> Path:
        """Return a copy of the folder before training."""
        return Path(shutil.copytree(self.folder, to))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    place = tmp_path_factory.mktemp("straight")
    folder, calls = save("qwen", place / "before")
    shutil.copytree(folder, place / "after")
    result = run(place / "after", calls)
    return Straight(folder, calls, result, load_file(place / "after" / STUDENTS))


def squeezed(name: str, straight: Straight, tight: Callable[[int], int]) -> dict[str, Any]:
    """Return limits under which one student trains at a time, from a cache or with the teacher run at every step."""
    depth = straight.result.schedules[0]
    assert depth.schedule is not None and (depth.schedule.kind, depth.schedule.at_once) == ("cached", 2)
    if name == "cached":
        needs = [cost.held + cost.step for plan in straight.result.schedules for cost in plan.costs]
        needs += [p.teacher.block + max(p.teacher.states) for p in straight.result.schedules if p.teacher]
        return {"memory": tight(max(needs) + 10_000)}
    # The disk has room for one student's three checkpoints and no cache, the memory for the two calls of a step.
    disk = sum(2 * cost.weights for cost in depth.costs) + 3 * max(cost.saved for cost in depth.costs)
    border = max(sum(cost.border.values()) for cost in depth.costs)
    return {"disk": disk, "cache_memory": int(2.25 * border)}


class _Killed(Exception):
    """Stands for the signal that ends a run."""


def kill_at(label: str, done: int) -> Callable[[int, int, str], None]:
    """Return a report that ends the run when something of that label has come so far."""

    def report(at: int, total: int, words: str) -> None:
        if words.startswith(label) and at == done:
            raise _Killed

    return report


MOMENTS: dict[str, list[tuple[str, int]]] = {
    # In the teacher's pass, inside of the first group, after the first group was finished.
    "cached": [
        ("running", 12),
        ("depth, depth:transformer_blocks.0-1", 3),
        ("depth, depth:transformer_blocks.2-3", 1),
    ],
    "recomputed": [("depth", 3)],
}


@pytest.mark.parametrize("name", MOMENTS)
def test_limits_and_kills_change_nothing_to_the_bit(
    name: str, straight: Straight, tight: Callable[[int], int], tmp_path: Path
) -> None:
    folder = straight.copy(tmp_path / "student")
    untouched = (folder / STUDENTS).read_bytes()
    options = {**squeezed(name, straight, tight), "every": 2, "resume": True}
    told: list[str] = []
    for label, done in MOMENTS[name]:
        with pytest.raises(_Killed):
            run(folder, straight.calls, report=kill_at(label, done), tell=told.append, **options)
        assert (folder / STUDENTS).read_bytes() == untouched
    assert told[0].endswith("1 at a time") and told[1].startswith(f"  {name}: "), told
    result = run(folder, straight.calls, **options)
    assert curves(result) == curves(straight.result)
    found = load_file(folder / STUDENTS)
    assert all(torch.equal(found[key], tensor) for key, tensor in straight.students.items())


def test_a_run_that_has_ended_is_not_trained_again(straight: Straight) -> None:
    folder = straight.folder.parent / "after"
    before = (folder / STUDENTS).read_bytes()
    again = run(folder, straight.calls, resume=True)
    assert curves(again) == curves(straight.result) and not again.lines
    assert (folder / STUDENTS).read_bytes() == before


def test_a_damaged_cache_is_computed_again(
    straight: Straight, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    folder = straight.copy(tmp_path / "student")
    spoilt: list[Path] = []

    def spoil(done: int, total: int, label: str) -> None:
        if label.startswith("depth") and not spoilt:
            for file in (folder / "bounded" / "cache").rglob("*.safetensors"):
                spoilt.append(file)
                data = bytearray(file.read_bytes())
                data[-1] ^= 1
                file.write_bytes(bytes(data))

    result = run(folder, straight.calls, cache_memory=0, report=spoil)
    assert spoilt
    assert "computed again" in caplog.text and "checksum" in caplog.text
    assert curves(result) == curves(straight.result)


def test_a_dry_run_tells_the_schedule_and_writes_nothing(saved: tuple[Path, Calls]) -> None:
    folder, calls = saved
    before = sorted(path.name for path in folder.rglob("*"))
    training = prepared(folder, calls, speeds=None, memory=8 * 2**30)
    told, plans = training.lines, training.schedules
    assert sorted(path.name for path in folder.rglob("*")) == before
    text = "\n".join(told)
    assert "stage depth: 2 students, 4 steps, 2 at a time" in text
    for part in (
        "cached: the teacher runs once",
        "memory: ",
        " of 8.00 GiB",
        "disk: ",
        "FLOPs of the teacher",
        "time: about",
    ):
        assert part in text
    assert all(plan.schedule and plan.schedule.price.training_flops > 0 for plan in plans)


def test_bf16_students_train_float32_masters(tmp_path: Path) -> None:
    folder, calls = save("qwen", tmp_path / "student", torch.bfloat16)
    model, _ = build("qwen", torch.bfloat16)
    expected = train(model, calls, stages=["depth"], steps=[3], out=tmp_path / "plain", batch=1, lr=3e-3)
    result = run(folder, calls, stages=("depth",), steps=(3,), batch=1, checkpointing=True)
    assert curves(result) == curves(expected)
    found, state = load_file(folder / STUDENTS), model.graph.state_dict()
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())


def test_a_student_that_diverges_stops_and_the_others_go_on(
    saved: tuple[Path, Calls], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, calls = saved
    step = StageTrainer.step

    def spoil(self: Any) -> Any:
        if self.stage.problem.number == 0 and self.done == 2:
            next(iter(self.stage.tensors_by_name.values())).data.fill_(float("nan"))
        return step(self)

    monkeypatch.setattr(StageTrainer, "step", spoil)
    result = run(folder, calls, stages=("depth",), steps=(4,))
    ((edit, why),) = (result.stopped or {}).items()
    assert edit == "depth:transformer_blocks.0-1"
    assert re.fullmatch(rf"step 3: the loss of {edit} is nan \(calls \d+, \d+\); the weights that it began with.*", why)
    assert [len(values) for values in curves(result)["depth"].values()] == [2, 4]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stages": ("depth", "finetune"), "steps": (1, 1)}, "stage finetune trains a whole mixture"),
        ({"stages": ("widht",), "steps": (1,)}, "unknown stage 'widht' (did you mean 'width'?)"),
        ({"steps": (1,)}, "2 stages but 1 numbers of steps"),
        ({"weights": Weights(relative=0.5)}, "give batch 1"),
        ({"memory": MARGIN}, "--memory-limit: too small by"),
        ({"disk": 1000}, "--disk-limit 0.0 MiB: too small for this training; give at least"),
    ],
)
def test_what_cannot_be_done_is_refused(
    options: dict[str, Any], reason: str, saved: tuple[Path, Calls], tight: Callable[[int], int]
) -> None:
    folder, calls = saved
    with pytest.raises(PpclError) as caught:
        run(folder, calls, **options)
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert not (folder / "bounded").exists()


def test_an_unfinished_run_is_not_overwritten_nor_taken_for_another(saved: tuple[Path, Calls]) -> None:
    folder, calls = saved
    with pytest.raises(_Killed):
        run(folder, calls, report=kill_at("running", 2))
    with pytest.raises(PpclError, match="holds a training that did not end; resume it"):
        run(folder, calls)
    with pytest.raises(PpclError, match=r"trained with lr 0\.003, not 0\.1"):
        run(folder, calls, resume=True, lr=0.1)
    assert json.loads((folder / "bounded" / "run.json").read_text())["ended"] is False
