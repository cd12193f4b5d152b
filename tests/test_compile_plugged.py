"""A pluggable model compiles with ``fullgraph=True`` after whatever changed it, without a call before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ppcl_fx
from ppcl_fx.errors import PpclError
from ppcl_fx.model.rewrite import rewrite
from ppcl_fx.passes.lowering.narrow import is_copied, rows_of
from ppcl_fx.schema.plan import DepthEdit, FfnEdit, Plan, TextStreamEdit
from ppcl_fx.tracing import trace
from tests import models
from tests.lora import loras

pytestmark = pytest.mark.slow

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
    "retrace": lambda model, _: _retraced(model.plug(students=model.edits)),
    "load a LoRA": lambda model, place: _with_lora(model.plug(students=model.edits), place),
    "unload a LoRA": lambda model, place: _without_lora(_with_lora(model.plug(students=model.edits), place)),
    "train and eval": lambda model, _: model.plug(students=model.edits).train().eval(),
}


def _loaded(model: ppcl_fx.PluggableModel, place: Path) -> ppcl_fx.PluggableModel:
    model.save(place / "student")
    loaded = ppcl_fx.load(place / "student")
    assert isinstance(loaded, ppcl_fx.PluggableModel)
    return loaded


def _retraced(model: ppcl_fx.PluggableModel) -> ppcl_fx.PluggableModel:
    model.retrace(**models.tiny_qwen(blocks=4)[1])
    return model


def _with_lora(model: ppcl_fx.PluggableModel, place: Path) -> ppcl_fx.PluggableModel:
    model.load_lora_adapter(loras.save(models.tiny_qwen(blocks=4)[0], place), adapter_name="style")
    model.set_adapters("style", 0.5)
    return model


def _without_lora(model: ppcl_fx.PluggableModel) -> ppcl_fx.PluggableModel:
    model.unload_lora()
    return model


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


@pytest.fixture
def copying() -> tuple[ppcl_fx.PluggableModel, dict[str, Any]]:
    """A model whose mixture copies rows that lie apart: SD3's dual-attention block without its feed-forward."""
    teacher, kwargs = models.tiny_sd3()
    edits = [DepthEdit(stack=STACK, first=0, last=1), FfnEdit(stack=STACK, block=2)]
    return rewrite(trace(teacher, kwargs), Plan(edits=edits)), kwargs


def answer(model: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        result = model(**{**kwargs, "return_dict": False})[0]
    assert isinstance(result, torch.Tensor)
    return result


def test_weights_that_are_written_to_reach_the_mixture(copying: Any) -> None:
    model, kwargs = copying
    model.plug(students=model.edits)
    copied = [tensor for tensor in model.graph_module().parameters() if is_copied(tensor)]
    before = answer(model, kwargs)
    with torch.no_grad():
        for weight in model.graph.parameters():
            weight.mul_(1.1)
    after = answer(model, kwargs)
    assert len(copied) == 2
    assert all(torch.equal(tensor, torch.cat(rows_of(tensor))) for tensor in copied)
    assert not torch.equal(after, before)
    model.weights_changed()
    assert torch.equal(answer(model, kwargs), after)


def test_a_lora_s_weight_compiles_nothing_again(copying: Any, tmp_path: Path) -> None:
    model, kwargs = copying
    graphs = []

    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        del inputs
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(model.plug(students=model.edits), backend=backend, fullgraph=True)
    model.load_lora_adapter(loras.save(models.tiny_sd3()[0], tmp_path))
    answers = []
    for weight in (1.0, 0.5, 0.0):
        model.set_adapters("default_0", weight)
        answers.append(answer(compiled, kwargs))
        assert torch.equal(answers[-1], answer(model, kwargs))
    assert len(graphs) == 1
    assert not torch.equal(answers[0], answers[1])
    model.unload_lora()
    assert torch.equal(answers[2], answer(model, kwargs))


def test_a_mixture_that_cannot_be_made_is_not_plugged(copying: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = copying

    def refuse(*given: Any) -> Any:
        raise PpclError("no place for it")

    monkeypatch.setattr("ppcl_fx.model.pluggable.plugged", refuse)
    with pytest.raises(PpclError, match="no place for it"):
        model.plug(students=model.edits)
    assert model.students == ()
