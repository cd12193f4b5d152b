"""Position inputs: named for what they are, none that follows from another, and as earlier versions had them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from ppcl_fx.export import PositionsAsInputs, lower
from ppcl_fx.export.onnx.graph_run import run_graph
from ppcl_fx.ir.graphs import copy_graph_module
from ppcl_fx.passes.contract import Pipeline
from ppcl_fx.passes.edits.plug import plugged
from ppcl_fx.passes.edits.text_stream import TextStream
from ppcl_fx.passes.lowering.positions import Form, tables
from ppcl_fx.tracing import bind, trace
from tests import models
from tests.coverage.case import Case
from tests.coverage.table import CASES

pytestmark = pytest.mark.slow

STREAMS = ("hidden_states", "encoder_hidden_states", "timestep")


@pytest.fixture(scope="module")
def student() -> tuple[GraphModule, dict[str, Any]]:
    """Qwen-Image with a text-stream edit over its last three blocks, whose attention is opened."""
    model, kwargs = models.tiny_qwen(blocks=6)
    gm = copy_graph_module(trace(model, kwargs))
    edit = TextStream("transformer_blocks", 3, 5)
    Pipeline([edit])(gm)
    return plugged(gm, frozenset({edit.edit.id})), kwargs


@pytest.mark.parametrize(("form", "count"), [("tables", 2), ("nodes", 10)])
def test_views_of_a_table_are_no_inputs(student: tuple[GraphModule, dict[str, Any]], form: Form, count: int) -> None:
    gm, kwargs = student
    lowered = lower(gm, form)
    assert lowered.inputs[:3] == STREAMS
    assert len(lowered.inputs) == 3 + count
    other = models.qwen_kwargs(batch=3, height=6, width=2, text=9)
    for call in (bind(gm, kwargs), bind(gm, other)):
        expected = run_graph(gm, call)[0]
        assert torch.equal(run_graph(lowered.graph, lowered.feeds(call))[0], expected)


def test_names_say_what_inputs_are(student: tuple[GraphModule, dict[str, Any]]) -> None:
    assert lower(student[0]).inputs[3:] == ("image_rotary", "text_rotary")
    old = lower(student[0], "nodes").inputs[3:]
    assert old[:2] == ("pos_embed_0", "pos_embed_1")
    assert all(name.startswith("unsqueeze_") for name in old[2:])


def case(wanted: str) -> Case:
    return next(one for one in CASES if one.id == wanted)


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("QwenImageTransformer2DModel (layered)", {"image_rotary": (48, 8, 2), "text_rotary": (5, 8, 2)}),
        # One table of truth values, compared anew in each modulation of each block.
        (
            "QwenImageTransformer2DModel (several images, `zero_cond_t`)",
            {"image_rotary": (48, 8, 2), "text_rotary": (5, 8, 2), "image_positions": (2, 48, 1)},
        ),
        # The text is no stream of its blocks, they only look at it.
        ("NucleusMoEImageTransformer2DModel", {"image_rotary": (16, 8, 2), "text_rotary": (5, 8, 2)}),
    ],
)
def test_tables_of_other_models(wanted: str, names: dict[str, tuple[int, ...]]) -> None:
    found = case(wanted)
    kwargs = found.kwargs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # diffusers' Nucleus initialises a weight of no elements
        gm = trace(found.build(), kwargs)
    lowered = lower(gm)
    feeds = lowered.feeds(bind(gm, kwargs))
    assert {name: tuple(feeds[name].shape) for name in lowered.inputs if name not in kwargs} == names


def toy(function: Any, **values: Any) -> GraphModule:
    gm = torch.fx.symbolic_trace(function)
    results = dict(values)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            value = results[node.name]
        elif node.op == "call_function":
            value = node.target(*(results.get(getattr(a, "name", ""), a) for a in node.args), **node.kwargs)
        elif node.op == "call_method":
            value = getattr(results[node.args[0].name], node.target)(*node.args[1:])
        else:
            continue
        results[node.name] = value
        node.meta["val"] = value.to("meta") if isinstance(value, torch.Tensor) else value
    return gm


def test_cosines_and_sines_are_told_apart() -> None:
    def rotated(x: torch.Tensor, tokens: int) -> torch.Tensor:
        angles = torch.arange(tokens).float().unsqueeze(-1) * 0.5
        return x * angles.cos() + x * angles.sin() + x * angles

    gm = toy(rotated, x=torch.ones(2, 5, 4), tokens=5)
    expected = rotated(torch.ones(2, 5, 4), 5)
    assert PositionsAsInputs()(gm).modified
    assert [n.target for n in gm.graph.find_nodes(op="placeholder")] == ["x", "positions", "rotary_cos", "rotary_sin"]
    call = {"x": torch.ones(2, 5, 4), "tokens": 5}
    gm.recompile()
    assert torch.equal(gm(x=call["x"], **tables(gm, call)), expected)


def test_what_works_in_place_is_not_shared() -> None:
    def counted(x: torch.Tensor, tokens: int) -> torch.Tensor:
        first, second = (torch.arange(tokens).float().unsqueeze(-1) for _ in range(2))
        return x + first.add_(1) + second

    gm = toy(counted, x=torch.ones(2, 5, 4), tokens=5)
    assert PositionsAsInputs()(gm).modified
    gm.recompile()
    call = {"x": torch.ones(2, 5, 4), "tokens": 5}
    found = tables(gm, call)
    assert len(found) == 2
    assert torch.equal(gm(x=call["x"], **found), counted(**call))
