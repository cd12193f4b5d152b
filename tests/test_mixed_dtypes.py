"""Models whose weights have several dtypes: every class that diffusers keeps partly in float32, saved and loaded."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import ppcl_fx
from ppcl_fx.ir.stacks import stacks
from ppcl_fx.model.pluggable import CARD, PluggableModel
from ppcl_fx.model.rewrite import rewrite
from ppcl_fx.model.sources import open_source
from ppcl_fx.model.student_folder import StudentFolder, load_finetuned, save_finetuned
from ppcl_fx.schema.plan import DepthEdit, Plan
from ppcl_fx.tracing import trace
from tests.coverage.case import Case, Kwargs
from tests.coverage.table import CASES

HALF = torch.bfloat16
MODELS = [case for case in CASES if hasattr(getattr(diffusers, case.name), "from_pretrained")]
MIXED = [case for case in MODELS if getattr(diffusers, case.name)._keep_in_fp32_modules]
PLAIN = ("FluxTransformer2DModel", "QwenImageTransformer2DModel", "SD3Transformer2DModel")
ON_DISK = [case for case in MODELS if case in MIXED or case.id in PLAIN]
# The warning is torch's, of one model.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")]
READS_VALUES = ("AnyFlowFARTransformer3DModel", "Kandinsky6SRTransformer3DModel")
"""Their traces need a call's values, and a saved model has shapes alone."""


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Batched floats in a dtype, as a pipeline of it passes them; lists of numbers as they are."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() and value.ndim > 1 else value
    return type(value)(cast(one, dtype) for one in value) if isinstance(value, (list, tuple)) else value


def call(case: Case, dtype: torch.dtype) -> Kwargs:
    return {name: cast(value, dtype) for name, value in case.kwargs().items()}


def answers(model: nn.Module, kwargs: Kwargs) -> list[torch.Tensor]:
    with torch.no_grad():
        return [value for value in torch.utils._pytree.tree_leaves(model(**kwargs)) if isinstance(value, torch.Tensor)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def pluggable(teacher: nn.Module, kwargs: Kwargs) -> PluggableModel:
    gm = trace(teacher, kwargs)
    stack = next(one for one in stacks(gm) if len(one.blocks) > 1)
    first, second, *_ = stack.blocks
    return rewrite(gm, Plan(edits=[DepthEdit(stack=first.stack, first=first.index, last=second.index)]))


def saved(case: Case, folder: Path) -> tuple[Any, Kwargs, PluggableModel]:
    """Save a model, load it in bfloat16 as a pipeline does, save a student of it; return both."""
    kind = getattr(diffusers, case.name)
    case.build().save_pretrained(folder / "float32")
    kind.from_pretrained(folder / "float32", torch_dtype=HALF).save_pretrained(folder / "teacher")
    teacher = kind.from_pretrained(folder / "teacher", torch_dtype=HALF)
    kwargs = call(case, HALF)
    model = pluggable(teacher, kwargs)
    model.save(folder / "student")
    return teacher, kwargs, model


WAN = next(case for case in MIXED if case.id == "WanTransformer3DModel")


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Kwargs, PluggableModel]:
    folder = tmp_path_factory.mktemp("wan")
    return folder, *saved(WAN, folder)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", [case for case in MIXED if case.name not in READS_VALUES], ids=lambda case: case.id)
def test_a_student_has_the_dtypes_that_it_was_saved_with(case: Case, tmp_path: Path) -> None:
    teacher, kwargs, model = saved(case, tmp_path)
    expected = answers(teacher, kwargs)
    full = answers(model.plug(students=model.edits), kwargs)
    assert len(set(dtypes(teacher).values())) > 1 and model.dtype == teacher.dtype == HALF
    for loaded in (ppcl_fx.load(tmp_path / "student"), ppcl_fx.load(tmp_path / "student", dtype=HALF)):
        assert isinstance(loaded, PluggableModel)
        assert dtypes(loaded) == dtypes(model) and loaded.dtype == HALF
        assert same(answers(loaded.plug(students=[]), kwargs), expected)
        assert same(answers(loaded.plug(students=loaded.edits), kwargs), full)
    opened = StudentFolder.open(tmp_path / "student")
    assert {n: opened.read(n).dtype for n in model.graph.state_dict()} == {
        n: t.dtype for n, t in model.graph.state_dict().items()
    }


@pytest.mark.parametrize("case", ON_DISK, ids=lambda case: case.id)
def test_a_model_on_disk_has_the_dtypes_that_diffusers_gives(case: Case, tmp_path: Path) -> None:
    case.build().save_pretrained(tmp_path)
    expected = getattr(diffusers, case.name).from_pretrained(tmp_path, torch_dtype=HALF)
    checkpoint = open_source(str(tmp_path)).checkpoint(HALF)
    assert dtypes(checkpoint.model) == dtypes(expected)
    assert checkpoint.dtype == expected.dtype
    own = dict(checkpoint.model.named_buffers())
    for name, buffer in expected.named_buffers():
        if name not in expected.state_dict():
            assert torch.equal(own[name], buffer), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_dtype_is_what_diffusers_loads(wan: Any, dtype: torch.dtype) -> None:
    folder = wan[0]
    expected = diffusers.WanTransformer3DModel.from_pretrained(folder / "teacher", torch_dtype=dtype)
    by_name = functools.partial(PluggableModel.from_pretrained, folder / "student")
    for loaded in (ppcl_fx.load(folder / "student", dtype=dtype), by_name(torch_dtype=dtype)):
        assert isinstance(loaded, PluggableModel)
        found = dtypes(loaded.graph)
        assert {name: found[name] for name in dtypes(expected)} == dtypes(expected)
        kwargs = call(WAN, dtype)
        assert same(answers(loaded.plug(students=[]), kwargs), answers(expected, kwargs))


def test_a_moved_model_is_diffusers_moved_model_and_is_saved_as_it_is(wan: Any, tmp_path: Path) -> None:
    """`to` casts everything, what the class keeps in float32 and tables that no file holds included."""
    model = ppcl_fx.load(wan[0] / "student")
    assert isinstance(model, PluggableModel)
    teacher = diffusers.WanTransformer3DModel.from_pretrained(wan[0] / "teacher", torch_dtype=HALF)
    model.to(torch.float16), teacher.to(torch.float16)
    kwargs = call(WAN, torch.float16)
    expected = answers(teacher, kwargs)
    assert same(answers(model.plug(students=[]), kwargs), expected)
    model.save(tmp_path / "moved")
    loaded = ppcl_fx.load(tmp_path / "moved")
    assert isinstance(loaded, PluggableModel)
    assert set(dtypes(loaded).values()) == {torch.float16} and dtypes(loaded) == dtypes(model)
    assert same(answers(loaded.plug(students=[]), kwargs), expected)
    assert dtypes(StudentFolder.open(tmp_path / "moved").model) == dtypes(model)


def test_a_folder_of_an_older_version_says_no_dtypes(wan: Any, tmp_path: Path) -> None:
    _, teacher, kwargs, model = wan
    model.plug(students=[]).save(tmp_path / "old")
    card = json.loads((tmp_path / "old" / CARD).read_text())
    (tmp_path / "old" / CARD).write_text(json.dumps({n: v for n, v in card.items() if n not in ("dtype", "dtypes")}))
    loaded = ppcl_fx.load(tmp_path / "old")
    assert dtypes(loaded) == dtypes(model)
    assert same(answers(loaded, kwargs), answers(teacher, kwargs))


def test_a_fine_tuned_model_keeps_its_dtypes(wan: Any, tmp_path: Path) -> None:
    _, _, kwargs, model = wan
    model.plug(students=model.edits)
    expected = answers(model, kwargs)
    masters = copy.deepcopy(model.graph_module()).float()
    save_finetuned(masters, model, model.edits, tmp_path / "finetuned")
    again = ppcl_fx.load(wan[0] / "student")
    assert isinstance(again, PluggableModel)
    tuned = load_finetuned(again, tmp_path / "finetuned")
    inputs = {name: value for name, value in kwargs.items() if name != "return_dict"}
    assert same(answers(tuned, inputs), expected)


@pytest.mark.parametrize("kind", ["FluxTransformer2DModel", "QwenImageTransformer2DModel"])
def test_a_model_with_one_dtype_lists_none(kind: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.id == kind)
    pluggable(case.build(), case.kwargs()).save(tmp_path / "student")
    card = json.loads((tmp_path / "student" / CARD).read_text())
    assert (card["dtype"], card["dtypes"]) == ("float32", {})
