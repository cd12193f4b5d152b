"""Calls that one trace cannot serve: one graph a kind, over the same weights, from analysis to training."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ppcl_fx
from ppcl_fx import EngineTransformer
from ppcl_fx.calls.kinds import ones_in
from ppcl_fx.calls.store import Call, Calls
from ppcl_fx.errors import GuardError, PpclError
from ppcl_fx.export import ExportConfig, export
from ppcl_fx.io.fingerprint import fingerprint
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.model.rewrite import rewrite_streamed
from ppcl_fx.model.sources import open_source
from ppcl_fx.passes.analysis.analyze import analyze_streamed
from ppcl_fx.schema.plan import DepthEdit, FfnEdit, Plan, TextStreamEdit
from ppcl_fx.tracing import bind, graph_for, trace, with_rows
from ppcl_fx.train import train
from ppcl_fx.train.bounded.trainer import BoundedTraining
from ppcl_fx.train.config import TrainConfig, Weights
from ppcl_fx.train.core.stages import WHOLE, Distillation, FineTuning
from tests import models
from tests.test_kinds import MASK, NeedsAMask, answer
from tests.toys import build, example

pytestmark = pytest.mark.slow

STACK = "transformer_blocks"
PLAN = Plan(
    edits=[
        DepthEdit(stack=STACK, first=0, last=1),
        FfnEdit(stack=STACK, block=3),
        TextStreamEdit(stack=STACK, source=3, last=4),
    ]
)


def guided() -> tuple[nn.Module, Calls]:
    """Qwen-Image with guidance: a padded batch, and one negative text for all of it, as its pipeline passes them."""
    model, _ = models.tiny_qwen()
    calls = []
    for index in range(4):
        kwargs = models.qwen_kwargs(batch=4, text=5 + index % 2, seed=index, mask=index % 2 == 0)
        given = {name: value for name, value in kwargs.items() if value is not None}
        if index % 2:
            given["encoder_hidden_states"] = given["encoder_hidden_states"][:1, :1]
        prompts = tuple(f"{index // 2}.{i}" for i in range(4))
        calls.append(Call(given, prompts, 0.5, index, 4, index % 2, answer(model, given)))
    made = Calls(calls, fingerprint(model))
    made.ones = ones_in(made.examples(), model)
    return model, made


def test_each_kind_has_its_graph_over_the_same_weights() -> None:
    model, calls = guided()
    gm = trace(model, calls.examples())
    assert list(gm.meta["ppcl"]["ones"]) == [MASK] and len(gm.meta["ppcl"]["kinds"]) == 1
    assert graph_for(gm, calls[0].kwargs) is gm
    other = graph_for(gm, calls[1].kwargs)
    assert other is not gm and {id(p) for p in other.parameters()} <= {id(p) for p in gm.parameters()}
    for call in calls:
        graph = graph_for(gm, call.kwargs)
        assert torch.equal(answer(graph, bind(graph, call.kwargs)), answer(model, call.kwargs))


@pytest.mark.usefixtures("translated_once")
def test_one_negative_text_for_a_batch(tmp_path: Path) -> None:
    teacher, calls = guided()
    teacher.save_pretrained(tmp_path / "teacher")  # type: ignore[operator]
    checkpoint = open_source(str(tmp_path / "teacher")).checkpoint()
    gm = trace(teacher, calls.examples())
    plain = ppcl_fx.analyze(gm, calls)
    streamed = analyze_streamed(checkpoint, calls, tmp_path / "work")
    assert plain.calls_used == 4 and plain.samples_used == streamed.samples_used == 16
    for stream in ("image", "text"):
        one, two = plain.stacks[0].streams[stream], streamed.stacks[0].streams[stream]
        assert one.fit == pytest.approx(two.fit, abs=1e-6)
        assert one.delta[0][1:] == pytest.approx(two.delta[0][1:], abs=1e-6)
    model = ppcl_fx.rewrite(gm, PLAN, calls)
    rewrite_streamed(checkpoint, PLAN, tmp_path / "student", calls)
    loaded = ppcl_fx.load(tmp_path / "student")
    for name, fitted in model.students_module.state_dict().items():
        torch.testing.assert_close(loaded.students_module.state_dict()[name], fitted, rtol=0, atol=1e-4)
    steps = {"steps": (2, 2, 2), "stages": ("depth", "width", "finetune")}
    result = train(model, calls, out=tmp_path / "run", batch=1, tensorboard=False, **steps)
    assert all(len(values) == 2 for stage in result.stages for values in stage.losses.values())
    model.plug(students=model.edits)
    mixture = [answer(model, call.kwargs) for call in calls]
    model.save(tmp_path / "trained")
    again = ppcl_fx.load(tmp_path / "trained")
    tuned = result.finetuned_model
    assert tuned is not None
    shutil.copytree(tmp_path / "run" / "finetuned", tmp_path / "trained" / "finetuned")
    opened = ppcl_fx.load(tmp_path / "trained" / "finetuned")
    padded, single = calls[0].kwargs, calls[1].kwargs
    torch.testing.assert_close(answer(opened, padded), answer(tuned, bind(tuned, padded)), rtol=0, atol=1e-6)
    repeated = with_rows(tuned, single)
    torch.testing.assert_close(answer(opened, single), answer(tuned, bind(tuned, repeated)), rtol=0, atol=1e-6)
    for call, expected in zip(calls, mixture, strict=True):
        torch.testing.assert_close(answer(again, call.kwargs), expected, rtol=0, atol=1e-6)
    bounded = BoundedTraining(
        tmp_path / "student", calls, TrainConfig(stages=("depth",), steps=(2,), batch=1)
    ).run()
    (first,), (second,) = result.stages[0].losses.values(), bounded.stages[0].losses.values()
    assert first[0] == pytest.approx(second[0], rel=1e-4)
    export(model, tmp_path / "engines", ExportConfig(keep=(1.0,), runs=1), calls=calls)
    engine = EngineTransformer(tmp_path / "engines", device="cpu")
    for call in calls:
        torch.testing.assert_close(answer(engine, call.kwargs), answer(teacher, call.kwargs), rtol=0, atol=1e-5)


def two_kinds() -> tuple[nn.Module, Calls]:
    """A model that takes a missing mask for something else than ones, and calls with one and without."""
    model = build(NeedsAMask)
    calls = []
    for index in range(4):
        kwargs = {**example(2, 5 + index), "return_dict": False}
        if index % 2:
            kwargs["mask"] = (torch.arange(5 + index) < 4).float().expand(2, -1).contiguous()
        calls.append(Call(kwargs, (f"{index}",), 0.5, index, 2))
    return model, Calls(calls, fingerprint(model))


DEPTH = Plan(edits=[DepthEdit(stack="blocks", first=0, last=1)])


def test_a_model_that_is_of_no_library(tmp_path: Path) -> None:
    teacher, calls = two_kinds()
    gm = trace(teacher, calls.examples())
    assert gm.meta["ppcl"]["ones"] == {} and len(gm.meta["ppcl"]["kinds"]) == 1
    assert ppcl_fx.analyze(gm, calls).calls_used == 4
    model = ppcl_fx.rewrite(gm, DEPTH, calls)
    train(model, calls, out=tmp_path / "run", steps=(4, 2), stages=("depth", "finetune"), batch=1, tensorboard=False)
    students = [answer(model.plug(students=model.edits), call.kwargs) for call in calls]
    model.plug(students=[])
    for call, student in zip(calls, students, strict=True):
        expected = answer(teacher, call.kwargs)
        assert torch.equal(answer(model, call.kwargs), expected) and not torch.equal(student, expected)
    with pytest.raises(GuardError, match="'scale' was 'not given' while tracing; the model was traced from no class"):
        model(**calls[0].kwargs, scale=torch.ones(2))


def test_a_step_trains_what_a_model_of_that_kind_alone_trains() -> None:
    teacher, calls = two_kinds()
    both = ppcl_fx.rewrite(trace(teacher, calls.examples()), DEPTH)
    for call in calls:
        alone = ppcl_fx.rewrite(trace(teacher, call.kwargs), DEPTH)
        found = []
        for model in (both, alone):
            model.requires_grad_(False)
            model.students_module.requires_grad_(True)
            stage = Distillation(model, "depth", Weights())
            loss = stage.step(call.kwargs)
            grads = {name: p.grad for name, p in model.students_module.named_parameters()}
            model.requires_grad_(False)
            tuning = FineTuning(model, model.edits)
            whole = tuning.step(call.kwargs)[WHOLE]
            assert torch.equal(tuning.target(call.kwargs), answer(teacher, call.kwargs))
            found.append((loss, grads, whole, {n: p.grad for n, p in tuning.student.named_parameters()}))
            model.zero_grad()
            stage.stop(model.edits[0])
            assert stage.groups == {} and stage.evaluate(call.kwargs) == {}
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def pluggable(mask: bool) -> tuple[nn.Module, PluggableModel]:
    """A model that was traced with one kind of call, and knows no other."""
    teacher, _ = models.tiny_qwen()
    return teacher, ppcl_fx.rewrite(trace(teacher, models.qwen_kwargs(mask=mask)), PLAN)


@pytest.mark.parametrize("mask", [True, False])
def test_a_pluggable_model_traces_a_new_kind_by_itself(mask: bool) -> None:
    teacher, model = pluggable(mask)
    kinds = model.graph.meta["ppcl"]["kinds"]
    for _ in range(2):
        for other in (not mask, mask):
            kwargs = models.qwen_kwargs(batch=3, text=7, seed=5, mask=other)
            assert torch.equal(answer(model, kwargs), answer(teacher, kwargs))
    assert len(kinds) == 1, "it is remembered"
    new = models.qwen_kwargs(mask=not mask)
    students = answer(model.plug(students=model.edits), new)
    made = ppcl_fx.rewrite(trace(teacher, new), PLAN)
    made.students_module.load_state_dict(model.students_module.state_dict())
    assert torch.equal(students, answer(made.plug(students=made.edits), new))
    # Copies, moves and trained weights.
    twin = copy.deepcopy(model)
    assert torch.equal(answer(twin, new), students)
    with torch.no_grad():
        next(twin.students_module.parameters()).add_(1.0)
    assert not torch.equal(answer(twin, new), students) and torch.equal(answer(model, new), students)
    model.to(torch.float64)
    wide = {name: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for name, v in new.items()}
    torch.testing.assert_close(answer(model, wide), students.double(), rtol=0, atol=1e-5)


def test_a_kind_that_was_met_does_not_break_compilation() -> None:
    _, model = pluggable(True)
    plain, masked = models.qwen_kwargs(), models.qwen_kwargs(mask=True)
    expected = [answer(model, kwargs) for kwargs in (plain, masked)]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for kwargs, value in zip((plain, masked), expected, strict=True):
        assert torch.equal(answer(compiled, kwargs), value)


def test_calls_that_go_through_other_blocks_are_not_added() -> None:
    teacher, kwargs = models.tiny_sd3()
    given = {name: value for name, value in kwargs.items() if value is not None}
    skipped = {**given, "skip_layers": [2, 3]}
    made = [Call(one, ("a", "b"), 0.5, index, 2) for index, one in enumerate((given, skipped))]
    calls = Calls(made, fingerprint(teacher))
    with pytest.raises(PpclError, match="some go through other blocks than the rest"):
        ppcl_fx.analyze(trace(teacher, calls.examples()), calls)


def test_in_bounded_memory_calls_of_another_kind_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    _, model = pluggable(False)
    model.save(tmp_path / "student")
    kwargs = {name: v for name, v in models.qwen_kwargs(mask=True).items() if v is not None}
    calls = Calls([Call(kwargs, ("a", "b"), 0.5, 0, 2)])
    before = sorted(path.name for path in (tmp_path / "student").iterdir())
    with pytest.raises(
        PpclError, match=rf"'{MASK}' was 'not given' while tracing; train without --memory-limit"
    ):
        BoundedTraining(tmp_path / "student", calls, TrainConfig(stages=("depth",), steps=(1,)))
    assert sorted(path.name for path in (tmp_path / "student").iterdir()) == before
