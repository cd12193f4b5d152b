"""What students do to the output: measured as defined, kept with the weights they belong to, and used by `plug`."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ppcl_fx
from ppcl_fx.calls.store import Call, Calls
from ppcl_fx.errors import PpclError
from ppcl_fx.io.files import read_json, write_json
from ppcl_fx.report import write_report
from ppcl_fx.schema.measured_effects import EFFECTS, Effects, load_effects
from ppcl_fx.schema.plan import DepthEdit, Plan
from ppcl_fx.train import measure_effects, predicted_and_measured, train
from ppcl_fx.train.core.batches import spaced
from ppcl_fx.train.metrics.effects import OutputErrors, ratios
from tests import models
from tests.passes.test_plug import EDITS
from tests.train.pluggable import build

pytestmark = pytest.mark.slow

KEEPS = 8


def _sets(names: list[str]) -> list[tuple[str, ...]]:
    return [some for n in range(len(names) + 1) for some in itertools.combinations(names, n)]


def _error(model: Any, calls: Calls, students: tuple[str, ...]) -> float:
    with torch.no_grad():
        ours = [model.plug(students=students)(**call.kwargs)[0].double() for call in calls]
        theirs = [model.plug(students=())(**call.kwargs)[0].double() for call in calls]
    apart = sum(float(((one - two) ** 2).sum()) for one, two in zip(ours, theirs, strict=True))
    return apart / sum(float((two**2).sum()) for two in theirs)


@pytest.fixture(scope="module", params=["qwen", "flux", "sd3"])
def measured(request: pytest.FixtureRequest) -> tuple[Any, Calls]:
    model, calls = build(request.param)
    model.effects = measure_effects(model, calls[:3])
    return model, calls[:3]


def test_an_effect_is_the_relative_squared_error_of_the_output(measured: tuple[Any, Calls]) -> None:
    model, calls = measured
    effects = model.effects
    assert [effect.edit for effect in effects.edits] == model.edits
    assert (effects.measured_on, effects.samples, effects.calls) == ([0, 1, 2], 6, calls.fingerprint)
    for effect in effects.edits:
        assert effect.on == []
        assert effect.error == pytest.approx(_error(model, calls, (effect.edit,)), rel=1e-9)
        assert effect.error > 0
    two = model.edits[:2]
    mixture = predicted_and_measured(model, calls, [1.0])[0]
    assert (mixture.students, mixture.predicted, mixture.measured) == ([], 0.0, 0.0)
    assert OutputErrors(model, calls).of(two) == pytest.approx(_error(model, calls, tuple(two)), rel=1e-9)


def test_plug_takes_the_least_summed_effect_of_all_sets(measured: tuple[Any, Calls]) -> None:
    model, _ = measured
    for keep in ratios(model, KEEPS):
        model.plug(keep=keep)
        budget = keep * model.teacher_params
        assert model.param_count() <= budget
        fitting = [some for some in _sets(model.edits) if model.param_count(some) <= budget]
        least = min(model.effects.predicted(some) for some in fitting)
        assert model.effects.predicted(model.students) == pytest.approx(least, rel=1e-12)
    with pytest.raises(PpclError, match="out of reach"):
        model.plug(keep=0.01)


def test_measuring_changes_nothing(measured: tuple[Any, Calls]) -> None:
    model, calls = measured
    model.plug(students=model.edits[:1]).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert measure_effects(model, calls) == model.effects
    points = predicted_and_measured(model, calls)
    assert model.students == (model.edits[0],)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.eval()
    assert len(points) >= 5
    for point in points:
        assert point.params == model.param_count(point.students) <= point.keep * model.teacher_params
        if len(point.students) == 1:
            assert point.predicted == point.measured


def test_a_student_that_equals_its_teacher_has_no_effect_and_is_plugged_first() -> None:
    teacher, kwargs = models.tiny_qwen()
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name.startswith(("transformer_blocks.3.img_mod", "transformer_blocks.3.txt_mod")):
                parameter.zero_()  # no gate is open: the block passes its input on, and block 2 alone does the work
    good, bad = DepthEdit(stack="transformer_blocks", first=2, last=3, damage=9.0), DepthEdit(
        stack="transformer_blocks", first=0, last=1, damage=1.0
    )
    model = ppcl_fx.rewrite(ppcl_fx.trace(teacher, kwargs), Plan(edits=[bad, good]))
    calls = Calls([Call(kwargs, ("a square",), 0.5, 0, 2)])
    keep = model.param_count([good.id]) / model.teacher_params + 1e-9
    assert model.plug(keep=keep).students == (bad.id,), "by what the plan predicts"
    model.effects = measure_effects(model, calls)
    assert model.effects.errors[good.id] == 0.0 < model.effects.errors[bad.id]
    assert model.plug(keep=keep).students == (good.id,), "by measurement"
    model.effects = None
    assert model.plug(keep=keep).students == (bad.id,)


def test_an_edit_of_a_student_is_measured_on_it() -> None:
    teacher, kwargs = models.tiny_qwen()
    model = ppcl_fx.rewrite(ppcl_fx.trace(teacher, kwargs), Plan(edits=EDITS["qwen"]))
    calls = Calls([Call(kwargs, ("a square",), 0.5, 0, 2)])
    host, inner = "depth:transformer_blocks.1-2", "ffn:transformer_blocks.1"
    effects = measure_effects(model, calls)
    by_id = {effect.edit: effect for effect in effects.edits}
    assert {edit: effect.on for edit, effect in by_id.items() if effect.on} == {inner: [host]}
    both = _error(model, calls, (host, inner))
    assert by_id[inner].error == pytest.approx(max(0.0, both - by_id[host].error), rel=1e-6)
    assert effects.predicted([inner]) == 0.0
    assert effects.predicted([host, inner]) == by_id[host].error + by_id[inner].error
    model.effects = effects
    least = model.param_count(model.edits) / model.teacher_params
    assert set(model.plug(keep=least + 1e-9).students) == set(model.edits)
    assert inner not in model.plug(keep=0.99).students


def test_recorded_outputs_count_only_where_they_are_the_teacher_s() -> None:
    model, calls = build("flux")
    calls = calls[:2]
    with torch.no_grad():
        outputs = [model.plug(students=())(**call.kwargs)[0] for call in calls]
    right = Calls([replace(call, output=output) for call, output in zip(calls, outputs, strict=True)])
    wrong = Calls([replace(call, output=output + 1) for call, output in zip(calls, outputs, strict=True)])
    errors = [measure_effects(model, some).errors for some in (calls, right, wrong)]
    assert errors[0] == errors[1] == errors[2]


def test_effects_go_with_the_weights_they_were_measured_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, calls = build("flux")
    model.effects = measure_effects(model, calls[:1], losses={model.edits[0]: 0.25})
    model.save(tmp_path / "student")
    loaded = ppcl_fx.load(tmp_path / "student")
    assert loaded.effects == model.effects
    assert loaded.effects.edits[0].loss == 0.25
    assert ppcl_fx.load(tmp_path / "student", dtype=torch.bfloat16).effects == model.effects
    # Trained since, by whatever means: not used, and said so.
    with torch.no_grad():
        next(iter(loaded.students_module.parameters())).mul_(1.5)
    loaded.save_students(tmp_path / "student")
    with caplog.at_level(logging.WARNING, "ppcl_fx"):
        assert ppcl_fx.load(tmp_path / "student").effects is None
    assert "measured before the students were changed" in caplog.text
    loaded.effects = None
    loaded.save_students(tmp_path / "student")
    assert not (tmp_path / "student" / EFFECTS).exists()


def test_effects_of_another_plan_are_refused(tmp_path: Path) -> None:
    model, calls = build()
    model.effects = measure_effects(model, calls[:1])
    model.save(tmp_path / "student")
    path = tmp_path / "student" / EFFECTS
    words = r"effects\.json: measured for another plan or model"
    write_json(path, model.effects.model_copy(update={"plan": "0" * 64}))
    with pytest.raises(PpclError, match=words) as caught:
        ppcl_fx.load(tmp_path / "student")
    assert "\n" not in str(caught.value)
    weights = model.students_module.state_dict()
    write_json(path, model.effects.model_copy(update={"edits": model.effects.edits[1:]}))
    with pytest.raises(PpclError, match=words):
        load_effects(tmp_path / "student", model.plan, weights)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(PpclError, match="not valid JSON"):
        load_effects(tmp_path / "student", model.plan, weights)
    path.unlink()
    assert load_effects(tmp_path / "student", model.plan, weights) is None


def test_a_broken_student_is_named() -> None:
    model, calls = build()
    with torch.no_grad():
        for name, parameter in model.students_module.named_parameters():
            if name.startswith("students.transformer_blocks_0_1."):
                parameter.fill_(float("nan"))
    with pytest.raises(PpclError, match=r"depth:transformer_blocks\.0-1 plugged holds NaN"):
        measure_effects(model, calls[:1])
    with pytest.raises(PpclError, match="measure them first"):
        predicted_and_measured(model, calls)
    with pytest.raises(PpclError, match="at least one"):
        measure_effects(model, calls, only=[])


def test_training_measures_when_asked(tmp_path: Path) -> None:
    model, calls = build()
    options: dict[str, Any] = {"steps": [2, 2, 1], "batch": 1, "tensorboard": False}
    done = train(model, calls, out=tmp_path, held_out=0.4, effects=1, **options)
    effects = model.effects
    assert effects is not None
    assert len(effects.measured_on) == 1
    losses = {edit: values[-1][1] for stage in done.stages[:2] for edit, values in stage.held_out.items()}
    assert {effect.edit: effect.loss for effect in effects.edits} == losses
    assert len(effects.mixtures) >= 5
    one = calls[effects.measured_on[0] : effects.measured_on[0] + 1]
    assert effects.errors == pytest.approx({edit: _error(model, one, (edit,)) for edit in model.edits}, rel=1e-9)
    # Fine-tuning leaves the students as they are; distilling them does not.
    train(model, calls, out=tmp_path / "more", stages=["finetune"], **{**options, "steps": [1], "keep": 0.9})
    assert model.effects is effects
    train(model, calls, out=tmp_path / "again", stages=["width"], **{**options, "steps": [1]})
    assert model.effects is None


def test_calls_are_spread_and_ratios_can_be_reached() -> None:
    assert spaced([3, 5, 7, 9], 2) == [3, 7]
    assert spaced([3, 5], 8) == [3, 5]
    model, _ = build()
    shares = ratios(model)
    assert len(shares) >= 5
    assert shares == sorted(set(shares))
    assert set(model.plug(keep=shares[0]).students) == set(model.edits)


def test_the_report_draws_both(tmp_path: Path) -> None:
    from tests.test_report import Page

    model, calls = build()
    model.effects = measure_effects(model, calls[:1])
    mixtures = predicted_and_measured(model, calls[:1])
    model.effects = model.effects.model_copy(update={"mixtures": mixtures})
    write_json(tmp_path / EFFECTS, model.effects)
    effects = read_json(tmp_path / EFFECTS, Effects)
    page = Page(write_report(tmp_path / "report.html", effects=effects).read_text(encoding="utf-8"))
    assert [section["id"] for section in page.all("section")] == ["effects"]
    drawn = [m for m in mixtures for value in (m.predicted, m.measured) if value > 0]
    assert len(page.all("circle")) == len(drawn) >= 10
    for mixture in mixtures:
        assert f"{mixture.measured:.4g}" in page.words
    assert set(model.edits) <= set(page.words)
    alone = Page(
        write_report(tmp_path / "report.html", effects=effects.model_copy(update={"mixtures": []})).read_text()
    )
    assert alone.all("circle") == []
