"""A pluggable model compiles with ``fullgraph=True`` after whatever changed it, without a call before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ppcl_fx
from ppcl_fx.passes.rewrite import rewrite
from ppcl_fx.plan import DepthEdit, FfnEdit, Plan, TextStreamEdit
from ppcl_fx.tracing import trace
from tests import models

STACK = "transformer_blocks"


def pluggable() -> tuple[ppcl_fx.PluggableModel, dict[str, Any]]:
    teacher, kwargs = models.tiny_qwen(blocks=4)
    edits = [DepthEdit(stack=STACK, first=0, last=1), FfnEdit(stack=STACK, block=2)]
    plan = Plan(edits=[*edits, TextStreamEdit(stack=STACK, source=2, last=3)])
    return rewrite(trace(teacher, kwargs), plan), kwargs


CHANGES: dict[str, Callable[[ppcl_fx.PluggableModel, Path], ppcl_fx.PluggableModel]] = {
    "nothing": lambda model, _: model,
    "plug": lambda model, _: model.plug(students=model.edits),
    "plug twice": lambda model, _: model.plug(students=model.edits).plug(students=model.edits[:2]),
    "load": lambda model, place: _loaded(model.plug(students=model.edits), place),
    "to float64": lambda model, _: model.plug(students=model.edits).to(torch.float64),
    "train and eval": lambda model, _: model.plug(students=model.edits).train().eval(),
}


def _loaded(model: ppcl_fx.PluggableModel, place: Path) -> ppcl_fx.PluggableModel:
    model.save(place / "student")
    loaded = ppcl_fx.load(place / "student")
    assert isinstance(loaded, ppcl_fx.PluggableModel)
    return loaded


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_compiled_without_a_call_before(
    change: Callable[[ppcl_fx.PluggableModel, Path], ppcl_fx.PluggableModel], tmp_path: Path
) -> None:
    model, kwargs = pluggable()
    model = change(model, tmp_path)
    given = {
        name: value.to(model.dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in kwargs.items()
    }
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(**given)[0]
        assert torch.equal(compiled, model(**given)[0])


def test_weights_that_are_written_to_reach_the_mixture() -> None:
    """Rows that lie apart are copied into the mixture; a training step writes to where they come from."""
    model, kwargs = pluggable()
    model.plug(students=model.edits)
    with torch.no_grad():
        before = model(**kwargs)[0]
        for parameter in model.parameters():
            parameter.mul_(1.01)
        after = model(**kwargs)[0]
        model.weights_changed()
        assert torch.equal(after, model(**kwargs)[0])
    assert not torch.equal(before, after)
