"""The pluggable model: switching, counting, calling it like the transformer, and its folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import ppcl_fx
from ppcl_fx.errors import GuardError, PpclError
from ppcl_fx.io.files import read_safetensors, write_safetensors
from ppcl_fx.model.pluggable import PluggableModel, load
from ppcl_fx.model.rewrite import rewrite
from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, Plan, TextStreamEdit
from ppcl_fx.tracing import trace
from tests import models, toys
from tests.passes.by_hand import randomise

pytestmark = pytest.mark.slow

STACK = "transformer_blocks"
EDITS: list[Edit] = [
    DepthEdit(stack=STACK, first=0, last=1, damage=0.2),
    DepthEdit(stack=STACK, first=2, last=3, damage=0.9),
    FfnEdit(stack=STACK, block=4),
    TextStreamEdit(stack=STACK, source=4, last=5, damage=0.1),
]
DEPTH, WORST, FFN, TEXT = [edit.id for edit in EDITS]


@pytest.fixture(scope="module")
def built() -> tuple[Any, PluggableModel, dict[str, Any]]:
    teacher, kwargs = models.tiny_qwen()
    model = rewrite(trace(teacher, kwargs), Plan(edits=EDITS, reason=["by hand"]))
    randomise(model.graph)
    return teacher, model, kwargs


@pytest.fixture
def pluggable(built: tuple[Any, PluggableModel, dict[str, Any]]) -> tuple[Any, PluggableModel, dict[str, Any]]:
    built[1].plug(students=[])
    return built


@pytest.fixture(scope="module")
def folder(built: tuple[Any, PluggableModel, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built[1].plug(students=[TEXT, WORST]).save(tmp_path_factory.mktemp("saved") / "student")


def answer(model: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        result = model(**{**kwargs, "return_dict": False})[0]
    assert isinstance(result, torch.Tensor)
    return result


def test_it_is_the_teacher_until_something_is_plugged(pluggable: Any) -> None:
    teacher, model, kwargs = pluggable
    assert model.students == ()
    assert model.edits == [DEPTH, WORST, FFN, TEXT]
    for given in (kwargs, models.other_kwargs(teacher)):
        assert torch.equal(answer(model, given), answer(teacher, given))
    model.plug(students=model.edits)
    assert not torch.allclose(answer(model, kwargs), answer(teacher, kwargs), atol=1e-3)
    assert torch.equal(answer(model.plug(students=[]), kwargs), answer(teacher, kwargs))


def test_it_is_called_like_the_transformer(pluggable: Any) -> None:
    teacher, model, kwargs = pluggable
    named = {**kwargs, "return_dict": True}
    with torch.no_grad():
        assert torch.equal(model(**named).sample, teacher(**named).sample)
        assert isinstance(model(**{**kwargs, "return_dict": False}), tuple)
        first = named.pop("hidden_states")
        assert torch.equal(model(first, **named).sample, teacher(first, **named).sample)
    assert model.config.num_layers == models.QWEN_BLOCKS
    assert model.config["in_channels"] == teacher.config["in_channels"]
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    with model.cache_context("cond"):
        pass
    with pytest.raises(GuardError, match="'guidance'"):
        model(**{**kwargs, "guidance": torch.ones(2)})


def test_counts_are_exact_and_fall_with_each_student(pluggable: Any) -> None:
    teacher, model, _ = pluggable
    total = sum(p.numel() for p in teacher.parameters())
    assert model.teacher_params == model.plan.teacher_params == total
    counts = [model.param_count(model.edits[:n]) for n in range(len(EDITS) + 1)]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == len(counts)
    assert counts[-1] == model.plan.params
    for students in ([], [DEPTH], [FFN, TEXT], model.edits):
        model.plug(students=students)
        graph = model.graph_module()
        assert model.param_count() == model.param_count(students) == sum(p.numel() for p in graph.parameters())


@pytest.mark.parametrize("keep", [1.0, 0.9, 0.75, 0.6])
def test_a_budget_swaps_the_most_damaging_students_back_first(pluggable: Any, keep: float) -> None:
    _, model, _ = pluggable
    assert model.plug(keep=keep) is model
    assert model.param_count() <= keep * model.teacher_params
    if keep == 1.0:
        assert model.students == ()
    if keep == 0.75:
        assert WORST not in model.students
    # None of those that stay could be swapped back as well.
    for student in model.students:
        without = [other for other in model.students if other != student]
        assert model.param_count(without) > keep * model.teacher_params


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"keep": 1.5}, r"in \(0, 1\]; 1\.5 is outside"),
        ({"keep": 0.0}, "0 is outside"),
        ({"keep": float("nan")}, "nan is outside"),
        ({"keep": 0.1}, r"keep=0\.1 is out of reach: with all 4 edits of the plan 0\.\d+ of the parameters stay"),
        ({"students": ["depth:transformer_blocks.0-2"]}, r"did you mean 'depth:transformer_blocks\.\d-\d'"),
        ({}, "either keep=... or students=..."),
        ({"keep": 0.5, "students": []}, "either keep=... or students=..."),
    ],
)
def test_a_wrong_mixture_is_refused_and_changes_nothing(pluggable: Any, arguments: Any, words: str) -> None:
    _, model, _ = pluggable
    model.plug(students=[FFN])
    with pytest.raises(PpclError, match=words):
        model.plug(**arguments)
    assert model.students == (FFN,)


def test_training_reaches_the_plugged_model(pluggable: Any) -> None:
    _, model, kwargs = pluggable
    before = answer(model.plug(students=[DEPTH]), kwargs)
    weight = model.students_module.get_parameter("students.transformer_blocks_0_1.attn.to_q.weight")
    with torch.no_grad():
        old = weight.clone()
        weight.add_(0.5)
        assert not torch.equal(answer(model, kwargs), before)
        weight.copy_(old)
    assert torch.equal(answer(model, kwargs), before)
    names = {name.split(".")[0] for name, _ in model.students_module.named_parameters()}
    assert names == {"students", "projectors"}


def test_a_saved_model_is_the_same_to_the_bit(pluggable: Any, folder: Path) -> None:
    teacher, model, kwargs = pluggable
    loaded = ppcl_fx.load(folder)
    assert loaded.students == (WORST, TEXT)
    assert loaded.plan == model.plan
    assert not loaded.training
    assert torch.equal(answer(loaded, kwargs), answer(model.plug(students=[WORST, TEXT]), kwargs))
    for given in (kwargs, models.other_kwargs(teacher)):
        assert torch.equal(answer(loaded.plug(students=[]), given), answer(teacher, given))
        loaded.plug(students=loaded.edits)
        assert torch.equal(answer(loaded, given), answer(model.plug(students=model.edits), given))


def test_a_folder_is_loaded_in_another_dtype(pluggable: Any, folder: Path) -> None:
    _, model, kwargs = pluggable
    loaded = ppcl_fx.load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters() if p.is_floating_point()} == {torch.bfloat16}
    half = {k: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}
    expected = answer(model.plug(students=loaded.students), kwargs)
    # bfloat16 keeps 8 bits: a wrong mixture or a lost part is off by far more than 2 % of the output's norm.
    assert (answer(loaded, half).float() - expected).norm() < 0.02 * expected.norm()


def test_students_alone_are_saved_again(pluggable: Any, folder: Path, tmp_path: Path) -> None:
    _, model, kwargs = pluggable
    copied = shutil.copytree(folder, tmp_path / "copy")
    loaded = ppcl_fx.load(copied)
    with torch.no_grad():
        loaded.students_module.get_parameter("students.transformer_blocks_2_3.attn.to_q.weight").add_(0.5)
    loaded.save_students(copied)
    assert torch.equal(answer(ppcl_fx.load(copied), kwargs), answer(loaded, kwargs))
    assert not torch.equal(answer(loaded, kwargs), answer(model.plug(students=loaded.students), kwargs))


def test_a_folder_is_not_replaced_unless_told_to(pluggable: Any, folder: Path, tmp_path: Path) -> None:
    _, model, _ = pluggable
    target = model.save(tmp_path / "once")
    with pytest.raises(PpclError, match="once"):
        model.save(target)
    assert sorted(p.name for p in target.iterdir()) == sorted(p.name for p in folder.iterdir())
    model.plug(students=[FFN]).save(target, overwrite=True)
    assert json.loads((target / "ppcl.json").read_text())["plugged"] == [FFN]
    assert [p.name for p in tmp_path.iterdir()] == ["once"]


@pytest.mark.parametrize("name", ["ppcl.json", "plan.json", "students.safetensors", "teacher/config.json"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_folder_is_one_line(folder: Path, tmp_path: Path, name: str, damage: str) -> None:
    copied = shutil.copytree(folder, tmp_path / "copy")
    path = copied / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(PpclError) as error:
        ppcl_fx.load(copied)
    assert "\n" not in str(error.value)
    assert Path(name).name in str(error.value) or "teacher" in str(error.value)


def test_weights_that_do_not_fit_the_plan_are_refused(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "copy")
    plan = json.loads((copied / "plan.json").read_text())
    plan["edits"] = plan["edits"][1:]
    (copied / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(PpclError, match="it holds .*transformer_blocks_0_1.*, which no edit has"):
        ppcl_fx.load(copied)
    plan["edits"].append({"kind": "ffn", "stack": STACK, "block": 5})
    (copied / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(PpclError, match="is missing or of another shape"):
        ppcl_fx.load(copied)


def test_a_model_without_a_configuration_cannot_be_saved(tmp_path: Path) -> None:
    plan = Plan(edits=[DepthEdit(stack="blocks", first=0, last=1)])
    model = rewrite(trace(toys.build(toys.Toy), toys.example()), plan)
    with pytest.raises(PpclError, match="no diffusers configuration"):
        model.save(tmp_path / "toy")
    assert not (tmp_path / "toy").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_moved_to_another_dtype_is_saved_and_loaded(tmp_path: Path, dtype: torch.dtype) -> None:
    """Its teacher has another fingerprint then; exchanged weights are still seen."""
    teacher, kwargs = models.tiny_qwen(blocks=4)
    plan = Plan(edits=[DepthEdit(stack="transformer_blocks", first=0, last=1)])
    model = rewrite(trace(teacher, kwargs), plan).to(dtype)
    model.save(tmp_path / "moved")
    loaded = load(tmp_path / "moved")
    assert loaded.dtype == dtype
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    weights = tmp_path / "moved" / "teacher" / "diffusion_pytorch_model.safetensors"
    tensors = read_safetensors(weights)
    one, other = "transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.to_k.weight"
    write_safetensors(weights, {**tensors, one: tensors[other].clone(), other: tensors[one].clone()})
    with pytest.raises(PpclError, match="not the model that plan.json was made for"):
        load(tmp_path / "moved")
