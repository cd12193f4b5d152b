"""`train` end to end: students learn, the teacher stays, a killed run goes on to the bit, nonsense is refused."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppcl_fx.calls.store import Calls
from ppcl_fx.errors import PpclError
from ppcl_fx.model.mixtures import mixture
from ppcl_fx.train import Losses, TrainResult, load_finetuned, train
from ppcl_fx.train.config import Weights
from ppcl_fx.train.core.distillation_graph import train_only
from ppcl_fx.train.core.distiller import inputs
from ppcl_fx.train.core.stages import Compute, Distillation, FineTuning, prediction, terms
from tests.train.pluggable import build

pytestmark = pytest.mark.slow

STEPS = {"depth": 6, "width": 4, "finetune": 4}


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _run(model: Any, calls: Calls, out: Path, **options: Any) -> TrainResult:
    given = {"stages": list(STEPS), "steps": STEPS, "batch": 2, "lr": 3e-3, "every": 3, **options}
    given["steps"] = {name: given["steps"][name] for name in given["stages"]}
    return train(model, calls, out=out, **given)


class _Killed(Exception):
    """Stands for the signal that ends a run."""


def _kill_at(stage: str, step: int) -> Any:
    def progress(name: str, done: int, _total: int, _loss: float) -> None:
        if (name, done) == (stage, step):
            raise _Killed

    return progress


def _curves(result: TrainResult) -> dict[str, dict[str, list[float]]]:
    return {stage.label: stage.losses for stage in result.stages}


@pytest.mark.parametrize(
    ("kind", "sequential"), [("qwen", False), ("qwen", True), ("flux", False), ("sd3", False)]
)
def test_students_learn_and_the_teacher_stays(kind: str, sequential: bool, tmp_path: Path) -> None:
    model, calls = build(kind)
    before = _weights(model)
    flags = [p.requires_grad for p in model.parameters()]
    steps = {"depth": 20, "width": 20}
    result = _run(model, calls[:2], tmp_path, stages=list(steps), steps=steps, sequential=sequential)
    trained = {id(p) for p in model.students_module.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in trained:
            assert torch.equal(parameter, before[name])
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    curves = _curves(result)
    assert {edit for losses in curves.values() for edit in losses} == set(model.edits)
    for losses in curves.values():
        for curve in losses.values():
            assert len(curve) == 20
            assert curve[-1] < 0.9 * curve[0]


def test_fine_tuning_gives_one_model_and_leaves_the_pluggable_one(tmp_path: Path) -> None:
    model, calls = build()
    model.plug(students=model.edits[:1])
    before, plugged = _weights(model), list(model.students)
    steps = {"finetune": 30}
    result = _run(model, calls[:2], tmp_path, stages=["finetune"], steps=steps, finetune_lr=3e-3)
    assert list(model.students) == plugged
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    curve = _curves(result)["finetune"]["model"]
    assert curve[-1] < 0.9 * curve[0]

    tuned = result.finetuned_model
    assert tuned is not None
    assert result.finetuned == tmp_path / "finetuned"
    kept = sum(p.numel() for p in mixture(model, model.edits).parameters())
    assert sum(p.numel() for p in tuned.parameters()) == kept
    start = dict(mixture(model, model.edits).named_parameters())
    moved = [name for name, p in tuned.named_parameters() if not torch.equal(p, start[name])]
    teachers = set(mixture(model, []).state_dict())
    assert teachers & set(moved), "the kept blocks move as well"

    again = load_finetuned(model, tmp_path / "finetuned")
    assert {name: tuple(p.shape) for name, p in again.named_parameters()} == {
        name: tuple(p.shape) for name, p in tuned.named_parameters()
    }
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, tuned.get_parameter(name))


def test_fine_tuning_at_a_ratio_is_named_after_it(tmp_path: Path) -> None:
    model, calls = build()
    keep = (1 + model.plan.params / model.teacher_params) / 2 if model.plan.params else 0.7
    students = list(model.plug(keep=keep).students)
    result = _run(model, calls, tmp_path, stages=["finetune"], keep=keep)
    assert result.finetuned == tmp_path / f"finetuned-{keep:g}"
    assert list(_curves(result)) == [f"finetune-{keep:g}"]
    expected = sum(p.numel() for p in mixture(model, students).parameters())
    assert result.finetuned_model is not None
    assert sum(p.numel() for p in result.finetuned_model.parameters()) == expected


@pytest.mark.parametrize(("stage", "step"), [("depth", 5), ("width", 2), ("finetune", 4)])
def test_a_killed_run_goes_on_to_the_bit(stage: str, step: int, tmp_path: Path) -> None:
    straight, calls = build()
    expected = _run(straight, calls, tmp_path / "straight", ema=0.9)

    killed, _ = build()
    with pytest.raises(_Killed):
        _run(killed, calls, tmp_path / "killed", ema=0.9, progress=_kill_at(stage, step))
    assert not (tmp_path / "killed" / "losses.json").exists()
    again, _ = build()
    seen: list[tuple[str, int]] = []
    result = _run(
        again, calls, tmp_path / "killed", ema=0.9, resume=True,
        progress=lambda name, done, _total, _loss: seen.append((name, done)),
    )  # fmt: skip
    assert ("depth", 1) not in seen
    assert _curves(result) == _curves(expected)
    for (name, one), two in zip(straight.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert expected.finetuned_model is not None
    assert result.finetuned_model is not None
    for name, one in expected.finetuned_model.named_parameters():
        assert torch.equal(one, result.finetuned_model.get_parameter(name)), name


@pytest.mark.parametrize("kind", ["qwen", "flux", "sd3"])
def test_gradient_checkpointing_changes_nothing(kind: str, tmp_path: Path) -> None:
    plain, calls = build(kind)
    saving, _ = build(kind)
    steps = {"depth": 2, "width": 2, "finetune": 2}
    one = _run(plain, calls, tmp_path / "one", steps=steps)
    two = _run(saving, calls, tmp_path / "two", steps=steps, checkpointing=True)
    assert _curves(one) == _curves(two)
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert one.finetuned_model is not None
    assert two.finetuned_model is not None
    assert one.finetuned_model.code == two.finetuned_model.code
    for name, parameter in one.finetuned_model.named_parameters():
        assert torch.equal(parameter, two.finetuned_model.get_parameter(name)), name


def test_gradient_checkpointing_keeps_less(tmp_path: Path) -> None:
    """What autograd keeps for the backward pass, in bytes, is less than half."""
    kept: dict[bool, int] = {}
    for checkpointing in (False, True):
        model, calls = build()
        stage = FineTuning(model, model.edits, Compute(checkpointing))
        parameters = {p.untyped_storage().data_ptr() for p in stage.student.parameters()}
        seen: dict[int, int] = {}

        def keep(tensor: Tensor, parameters: set[int] = parameters, seen: dict[int, int] = seen) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            stage.step(calls[0].kwargs)
        kept[checkpointing] = sum(seen.values())
    assert kept[True] < 0.5 * kept[False]


def test_intervals_do_not_see_each_other(tmp_path: Path) -> None:
    """Another edit's student may start anywhere: this edit's curve is the same to the bit."""
    model, calls = build()
    other, _ = build()
    before = _run(model, calls, tmp_path / "one", stages=["depth"])
    first, last = next(iter(_curves(before)["depth"])), list(_curves(before)["depth"])[-1]
    assert first != last
    changed = _parameters(other, last)
    with torch.no_grad():
        for parameter in changed:
            parameter.mul_(1.5)
    after = _run(other, calls, tmp_path / "two", stages=["depth"])
    assert _curves(after)["depth"][first] == _curves(before)["depth"][first]
    assert _curves(after)["depth"][last] != _curves(before)["depth"][last]


def _parameters(model: Any, edit: str) -> list[nn.Parameter]:
    train_only(model, "depth")
    return Distillation(model, "depth", Weights()).groups[edit]


def test_bf16_autocast_trains_float32_weights(tmp_path: Path) -> None:
    model, calls = build()
    exact, _ = build()
    result = _run(model, calls, tmp_path / "bf16", autocast=True)
    plain = _run(exact, calls, tmp_path / "plain")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    curve, reference = (next(iter(_curves(r)["depth"].values())) for r in (result, plain))
    assert curve != reference
    assert curve == pytest.approx(reference, rel=0.1, abs=0.02)


def test_a_model_stored_in_bf16_trains_in_float32_and_goes_back(tmp_path: Path) -> None:
    straight, calls = build(dtype=torch.bfloat16)
    model, _ = build(dtype=torch.bfloat16)
    before = _weights(model.students_module)
    expected = _run(straight, calls, tmp_path / "straight")
    with pytest.raises(_Killed):
        _run(model, calls, tmp_path / "killed", progress=_kill_at("depth", 5))
    model, _ = build(dtype=torch.bfloat16)
    result = _run(model, calls, tmp_path / "killed", resume=True)
    assert _curves(result) == _curves(expected)
    for one, two in zip(straight.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert any(not torch.equal(p, before[n]) for n, p in model.students_module.named_parameters())
    assert result.finetuned_model is not None
    loaded = load_finetuned(model, tmp_path / "killed" / "finetuned")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_losses_are_written_and_earlier_stages_kept(tmp_path: Path) -> None:
    model, calls = build()
    _run(model, calls, tmp_path, stages=["depth", "width"])
    result = _run(model, calls, tmp_path, stages=["finetune"])
    found = Losses.open(result.losses)
    assert [stage.label for stage in found.stages] == ["depth", "width", "finetune"]
    assert found.stages[2].losses == _curves(result)["finetune"]
    assert found.stages[0].steps == 6
    assert all(stage.seconds > 0 for stage in found.stages)


def test_the_random_state_is_left_alone(tmp_path: Path) -> None:
    model, calls = build()
    before = torch.get_rng_state()
    _run(model, calls, tmp_path, stages=["depth"])
    assert torch.equal(torch.get_rng_state(), before)


def test_nan_in_every_loss_ends_with_one_line_and_a_good_checkpoint(tmp_path: Path) -> None:
    model, calls = build()

    def spoil(_stage: str, done: int, _total: int, _loss: float) -> None:
        if done == 4:
            with torch.no_grad():
                for parameter in model.students_module.parameters():
                    parameter.fill_(float("nan"))

    reason = r"^stage depth, step 5: the loss of depth:\S+ is nan \(calls? \d+(, \d+)*\); "
    with pytest.raises(PpclError, match=reason) as caught:
        _run(model, calls, tmp_path, progress=spoil)
    assert "\n" not in str(caught.value)
    assert all(p.grad is None for p in model.parameters())
    again, _ = build()
    assert _run(again, calls, tmp_path, resume=True).stages[0].steps == 6


def test_nan_in_a_call_is_refused(tmp_path: Path) -> None:
    model, calls = build()
    spoilt = copy.deepcopy(list(calls))
    spoilt[0].kwargs["hidden_states"].fill_(float("nan"))
    with pytest.raises(PpclError, match=r"call 0: 'hidden_states' holds NaN"):
        # The fingerprint looks at every call.
        _run(model, Calls(spoilt, calls.model), tmp_path)


def test_an_unfinished_run_is_not_overwritten_and_an_ended_one_is(tmp_path: Path) -> None:
    model, calls = build()
    with pytest.raises(_Killed):
        _run(model, calls, tmp_path, progress=_kill_at("depth", 4))
    with pytest.raises(PpclError, match="stopped at stage depth, step 3; resume it"):
        _run(model, calls, tmp_path)
    _run(model, calls, tmp_path, resume=True)
    _run(model, calls, tmp_path, stages=["depth"])


def test_resuming_with_nothing_there_begins(tmp_path: Path) -> None:
    model, calls = build()
    assert _run(model, calls, tmp_path, resume=True, stages=["depth"]).stages[0].steps == 6


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"lr": 1e-4}, r"trained with lr 0\.003, not 0\.0001"),
        ({"seed": 1}, "with seed 42, not 1"),
        (None, "other calls"),
    ],
)
def test_resuming_something_else_is_refused(
    changed: dict[str, Any] | None, reason: str, tmp_path: Path
) -> None:
    model, calls = build()
    with pytest.raises(_Killed):
        _run(model, calls, tmp_path, progress=_kill_at("depth", 4))
    with pytest.raises(PpclError, match=reason):
        _run(model, calls[:3] if changed is None else calls, tmp_path, resume=True, **(changed or {}))


def test_checkpoints_go_on_where_memory_options_change(tmp_path: Path) -> None:
    model, calls = build()
    with pytest.raises(_Killed):
        _run(model, calls, tmp_path, progress=_kill_at("depth", 4))
    _run(model, calls, tmp_path, resume=True, checkpointing=True, every=2)


def test_a_damaged_last_checkpoint_falls_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    straight, calls = build()
    _run(straight, calls, tmp_path / "straight")
    model, _ = build()
    with pytest.raises(_Killed):
        _run(model, calls, tmp_path / "killed", progress=_kill_at("width", 2))
    folder = tmp_path / "killed" / "checkpoints"
    newest = sorted(folder.iterdir())[-1] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    again, _ = build()
    _run(again, calls, tmp_path / "killed", resume=True)
    assert "damaged checkpoint passed over" in caplog.text
    for one, two in zip(straight.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch": 0}, "training option batch: input should be greater than 0, not 0"),
        ({"lr": -1.0}, "training option lr: "),
        ({"ema": 1.0}, "training option ema: "),
        ({"clip": 0.0}, "training option clip: "),
    ],
)
def test_nonsense_options_are_refused(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    model, calls = build()
    with pytest.raises(PpclError, match=reason):
        _run(model, calls, tmp_path, **options)
    assert not any(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_found_before_training(tmp_path: Path) -> None:
    model, calls = build()
    (tmp_path / "file").write_text("in the way")

    def never(*_: object) -> None:
        raise AssertionError("trained")

    with pytest.raises(PpclError, match=r"file/run: cannot be written \(Not a directory: "):
        _run(model, calls, tmp_path / "file" / "run", progress=never)


@pytest.mark.parametrize(("kind", "outputs"), [("qwen", 2), ("flux", 2), ("sd3", 2)])
def test_attention_outputs_are_terms_of_their_own(kind: str, outputs: int, tmp_path: Path) -> None:
    model, calls = build(kind)
    train_only(model, "depth")
    plain, whole = (Distillation(model, "depth", Weights(attention=weight)) for weight in (0.0, 0.5))
    twice = Distillation(model, "depth", Weights(attention=1.0)).evaluate(calls[0].kwargs)
    first = next(iter(plain.groups))
    names = terms(whole._distiller(model.graph).gm) - terms(plain._distiller(model.graph).gm)
    assert {f"attention.0.{i}" for i in range(outputs)} <= names
    one, half = (stage.evaluate(calls[0].kwargs)[first] for stage in (plain, whole))
    assert half > one
    torch.testing.assert_close(twice[first] - one, 2 * (half - one))
    result = _run(model, calls, tmp_path, stages=["depth", "width"], weights=Weights(attention=0.5))
    assert all(curve[-1] < curve[0] for curve in result.stages[0].losses.values())


def test_another_plans_finetuned_folder_is_refused(tmp_path: Path) -> None:
    model, calls = build()
    _run(model, calls, tmp_path, stages=["finetune"])
    model._plan = model.plan.model_copy(update={"model": "another"})
    with pytest.raises(PpclError, match="fine-tuned from another plan"):
        load_finetuned(model, tmp_path / "finetuned")


def test_the_fine_tuned_model_predicts_better_than_the_mixture(tmp_path: Path) -> None:
    model, calls = build()
    steps = {"finetune": 30}
    result = _run(model, calls[:2], tmp_path, stages=["finetune"], steps=steps, finetune_lr=3e-3, ema=0.8)
    tuned = result.finetuned_model
    assert tuned is not None

    def error(gm: Any) -> float:
        teacher = mixture(model, [])
        with torch.no_grad():
            outs = [prediction(g(*inputs(g, calls[0].kwargs))) for g in (gm, teacher)]
        return float((outs[0] - outs[1]).square().mean())

    assert error(tuned) < 0.9 * error(mixture(model, model.edits))
    shutil.rmtree(tmp_path)
