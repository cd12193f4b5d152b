"""Width edits on a depth student's block: what they aim at, and that they leave the student as it is."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ppcl_fx
from ppcl_fx.calls.store import Calls
from ppcl_fx.model.pluggable import STUDENTS, PluggableModel
from ppcl_fx.passes.analysis.probes import NormalEquations
from ppcl_fx.passes.calibration.initialise import RIDGE, fit_projectors, projector_sites
from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, Plan, TextStreamEdit
from ppcl_fx.tracing import bind
from ppcl_fx.train import train
from ppcl_fx.train.config import Weights
from ppcl_fx.train.core.distillation_graph import distil, train_only
from ppcl_fx.train.core.stages import Distillation
from tests import models
from tests.passes.by_hand import randomise
from tests.passes.test_distil import teacher_states, values
from tests.train.bounded.test_trainer import run
from tests.train.pluggable import build

pytestmark = pytest.mark.slow

STACK = "transformer_blocks"
CASES: dict[str, tuple[DepthEdit, list[Edit]]] = {
    "qwen": (
        DepthEdit(stack=STACK, first=2, last=3),
        [FfnEdit(stack=STACK, block=2), TextStreamEdit(stack=STACK, source=1, last=3)],
    ),
    "flux": (DepthEdit(stack=STACK, first=1, last=3), [FfnEdit(stack=STACK, block=1)]),
    "sd3": (
        DepthEdit(stack=STACK, first=5, last=6),
        [FfnEdit(stack=STACK, block=5), TextStreamEdit(stack=STACK, source=4, last=6)],
    ),
}


def rewritten(kind: str, edits: list[Edit]) -> tuple[PluggableModel, Calls]:
    """Return a model with these edits, its projectors fitted, and calls."""
    _, calls = build(kind)
    teacher, kwargs = {"qwen": models.tiny_qwen, "flux": models.tiny_flux, "sd3": models.tiny_sd3}[kind]()
    return ppcl_fx.rewrite(ppcl_fx.trace(teacher, kwargs), Plan(model=calls.model, edits=edits), calls), calls


def outputs(model: PluggableModel, calls: Calls, students: tuple[str, ...]) -> list[Tensor]:
    model.plug(students=students)
    with torch.no_grad():
        return [model(**call.kwargs)[0] for call in calls]


@pytest.mark.parametrize(("kind", "sequential"), [("qwen", False), ("flux", False), ("sd3", False), ("qwen", True)])
def test_width_edits_leave_the_student_that_they_are_on_as_it_is(kind: str, sequential: bool, tmp_path: Path) -> None:
    """With and without them in the plan, one student comes out, to the bit."""
    depth, width = CASES[kind]
    how: dict[str, Any] = {"steps": [3, 3], "lr": 3e-3, "batch": 2, "sequential": sequential}
    alone, calls = rewritten(kind, [depth])
    train(alone, calls, stages=["depth"], out=tmp_path / "alone", **{**how, "steps": [3]})
    both, _ = rewritten(kind, [depth, *width])
    start = {name: tensor.clone() for name, tensor in both.students_module.state_dict().items()}
    train(both, calls, stages=["depth", "width"], out=tmp_path / "both", **how)
    found = both.students_module.state_dict()
    for name, tensor in alone.students_module.state_dict().items():
        assert torch.equal(found[name], tensor), name
    trained = [name for name in found if not torch.equal(found[name], start[name])]
    assert {name.split(".")[0] for name in trained} == {"students", "projectors"}
    one, other = (outputs(model, calls, (depth.id,)) for model in (alone, both))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", list(CASES))
def test_each_mixture_s_target_is_what_the_teacher_has_there(kind: str) -> None:
    """A projector that gives a student's stream aims at the teacher; only what attends is the student's own."""
    depth, width = CASES[kind]
    model, calls = rewritten(kind, [depth, *width])
    randomise(model.graph)
    with torch.no_grad():
        for parameter in model.graph.get_submodule("students").parameters():
            parameter.add_(0.05)  # as after training: no block of the teacher
    kwargs = calls[0].kwargs
    teacher, _ = {"qwen": models.tiny_qwen, "flux": models.tiny_flux, "sd3": models.tiny_sd3}[kind]()
    wanted = teacher_states(teacher, kwargs)[depth.last]
    student = values(model, "depth", kwargs)[depth.id]
    found = values(model, "width", kwargs)
    for edit in width:
        seen = {name: pair for name, pair in found[edit.id].items() if not name.startswith("z")}
        if isinstance(edit, FfnEdit):
            assert set(seen) == {"image", "text", "linear.image", "linear.text"}
        for name, (value, target) in seen.items():
            if isinstance(edit, TextStreamEdit) and name == "image0":
                continue  # of the group's first block, which no student replaces
            stream = name.removeprefix("linear.").rstrip("0123456789")
            assert torch.equal(target, wanted[stream]), (edit.id, name)
            assert not torch.equal(value, student[stream][0]), (edit.id, name)


def test_the_student_s_own_value_is_the_target_only_before_its_attention() -> None:
    depth, width = CASES["qwen"]
    model, calls = rewritten("qwen", [depth, *width])
    with torch.no_grad():
        for parameter in model.graph.get_submodule("students").parameters():
            parameter.add_(0.05)
    z = values(model, "width", calls[0].kwargs)[width[1].id]["z"]
    student = model.graph.get_submodule("students.transformer_blocks_2_3")
    entering = teacher_states(models.tiny_qwen()[0], calls[0].kwargs)[1]["text"]
    seen: list[Tensor] = []
    handle = student.get_submodule("attn").register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    outputs(model, calls[:1], (depth.id,))
    handle.remove()
    assert torch.equal(z[1], seen[0]) and seen[0].shape == entering.shape


@pytest.mark.parametrize("kind", list(CASES))
def test_two_edits_on_one_student_train_apart_from_it(kind: str) -> None:
    depth, width = CASES[kind]
    model, calls = rewritten(kind, [depth, *width])
    train_only(model, "width")
    stage = Distillation(model, "width", Weights())
    assert {id(p) for group in stage.groups.values() for p in group} == {
        id(p) for p in model.graph.get_submodule("projectors").parameters()
    }
    stage.step(calls[0].kwargs)
    assert all(p.grad is None for p in model.graph.get_submodule("students").parameters())
    assert all(p.grad is not None for p in model.graph.get_submodule("projectors").parameters())


@pytest.mark.parametrize("kind", list(CASES))
def test_projectors_in_a_student_are_fitted_again_after_depth(kind: str, tmp_path: Path) -> None:
    """They are the least-squares maps of the trained student; those of the teacher's blocks are as they were."""
    depth, width = CASES[kind]
    edits: list[Edit] = [depth, *width, FfnEdit(stack=STACK, block=0)]
    model, calls = rewritten(kind, edits)
    before = {name: tensor.clone() for name, tensor in model.graph.state_dict().items()}
    train(model, calls, stages=["depth"], steps=[3], lr=3e-3, out=tmp_path)
    after = model.graph.state_dict()
    inside = {site.path for site in projector_sites(model.graph) if site.in_student}
    assert 0 < len(inside) < len(projector_sites(model.graph))
    for name, tensor in before.items():
        if name.startswith("projectors.") and ".state." not in name:  # from a state of the teacher's to another
            assert torch.equal(after[name], tensor) != (name.rpartition(".")[0] in inside), name
    # By hand: the student's state before its feed-forward, and the teacher's image where the interval ends.
    gm = model.graph
    (site,) = [s for s in projector_sites(gm) if s.path.endswith("image") and s.path in inside]
    sums = NormalEquations(bias=True)
    teacher, _ = {"qwen": models.tiny_qwen, "flux": models.tiny_flux, "sd3": models.tiny_sd3}[kind]()
    for call in calls:
        env = torch.fx.Interpreter(gm, garbage_collect_values=False)
        with torch.no_grad():
            env.run(*(bind(gm, call.kwargs)[str(n.target)] for n in gm.graph.nodes if n.op == "placeholder"))
        sums.add(env.env[site.nodes[0]], teacher_states(teacher, call.kwargs)[depth.last]["image"])
    solved = sums.solve(RIDGE)
    torch.testing.assert_close(after[f"{site.path}.weight"], solved.weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(after[f"{site.path}.bias"], solved.bias, rtol=0, atol=1e-6)


def test_fitting_runs_no_more_of_the_model_than_it_needs() -> None:
    depth, width = CASES["qwen"]
    model, calls = rewritten("qwen", [depth, *width])
    ran: list[str] = []
    for name, module in model.graph.named_modules():
        if name.endswith(".attn"):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    fit_projectors(model.graph, [calls[0].kwargs], in_students=True)
    assert set(ran) == {f"{STACK}.{i}.attn" for i in range(4)} | {"students.transformer_blocks_2_3.attn"}


@pytest.mark.parametrize("kind", list(CASES))
def test_bounded_training_gives_the_same_students_and_projectors(kind: str, tmp_path: Path) -> None:
    depth, width = CASES[kind]
    model, calls = rewritten(kind, [depth, *width])
    folder = model.plug(students=model.edits).save(tmp_path / "student")
    how: dict[str, Any] = {"batch": 1, "lr": 3e-3}
    train(model, calls, stages=["depth", "width"], steps=[3, 3], out=tmp_path / "plain", **how)
    run(folder, calls, steps=(3, 3), **how)
    expected = model.students_module.state_dict()
    loaded = ppcl_fx.load(folder).students_module.state_dict()
    assert (folder / STUDENTS).is_file() and loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_any_mixture_computes_what_its_parts_say() -> None:
    """Without its student an edit on it does nothing; the student alone is the student."""
    depth, width = CASES["qwen"]
    model, calls = rewritten("qwen", [depth, *width])
    ffn = width[0].id
    teacher, alone = outputs(model, calls, ()), outputs(model, calls, (depth.id,))
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, calls, (ffn,)), teacher, strict=True))
    assert model.param_count((ffn,)) == model.teacher_params
    for some in itertools.chain.from_iterable(itertools.combinations(model.edits, n) for n in (1, 2, 3)):
        assert all(value.isfinite().all() for value in outputs(model, calls, some))
    assert not torch.equal(alone[0], outputs(model, calls, (depth.id, ffn))[0])
    assert distil(model, "width").graph.find_nodes(op="placeholder")
