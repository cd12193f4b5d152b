"""Cutting a graph into segments: nothing but tensors crosses, and look-alike blocks share one structure."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ppcl_fx.export import ExportConfig, export_graph, exporting, lower
from ppcl_fx.export.onnx.graph_run import run_graph
from ppcl_fx.export.onnx.segments import GraphSegment, described, segments, structure
from ppcl_fx.tracing import bind, trace
from tests import models

Tiny = tuple[nn.Module, dict[str, Any]]


def keys(found: list[GraphSegment]) -> dict[str, str]:
    return {s.name: structure(s, [str(n.meta["val"].shape) for n in s.inputs]) for s in found}


def test_running_the_segments_is_running_the_graph(tiny: Tiny) -> None:
    model, kwargs = tiny
    gm = trace(model, kwargs)
    lowered = lower(gm)
    call = bind(gm, models.other_kwargs(model))
    feeds = lowered.feeds(call)
    values = {node: feeds[str(node.target)] for node in lowered.graph.graph.nodes if node.op == "placeholder"}
    for segment in segments(lowered.graph):
        with torch.no_grad():
            results = segment.graph(*(values[node] for node in segment.inputs))
        assert all(isinstance(result, torch.Tensor) for result in results)
        values |= dict(zip(segment.outputs, results, strict=True))
    (last,) = lowered.graph.graph.output_node().all_input_nodes
    assert torch.equal(values[last], run_graph(gm, call)[0])


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        # The text half of the last block is dead, so it is a class of its own.
        ("qwen", [["0", "1", "2", "3", "4"], ["5"]]),
        ("flux", [["0", "1", "2", "3"], ["s0", "s1", "s2", "s3"], ["s4"]]),
        ("sd3", [["0", "1", "2"], ["3", "4", "5", "6"], ["7"]]),
    ],
)
def test_look_alike_blocks_share_a_structure(name: str, classes: list[list[str]]) -> None:
    gm = lower(trace(*getattr(models, f"tiny_{name}")())).graph
    found: dict[str, list[str]] = {}
    for path, key in keys(segments(gm)).items():
        if path.rpartition(".")[2].isdigit():
            stack, _, index = path.rpartition(".")
            found.setdefault(key, []).append(f"s{index}" if stack.startswith("single") else index)
    assert sorted(found.values()) == sorted(classes)


def test_structure_sees_settings_that_are_in_no_shape(tiny_sd3: Tiny) -> None:
    model, kwargs = tiny_sd3
    gm = lower(trace(model, kwargs)).graph
    before = keys(segments(gm))
    changed = copy.deepcopy(gm)
    changed.get_submodule("transformer_blocks.3.attn.norm_q").eps = 0.5  # a plain attribute, deep inside a leaf
    after = keys(segments(changed))
    different = {name for name in before if before[name] != after[name]}
    assert different == {"transformer_blocks.3"}


class _Calls(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.function(x)
        assert isinstance(result, torch.Tensor)
        return result


def _scaled(by: float) -> Any:
    return lambda x: x * by


GELU = nn.functional.gelu


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (functools.partial(GELU), functools.partial(GELU, approximate="tanh")),
        (functools.partial(torch.clamp, min=-1.0), functools.partial(torch.clamp, min=-2.0)),
        (functools.partial(torch.add, torch.ones(1)), functools.partial(torch.add, torch.zeros(1))),
        (_scaled(2.0), _scaled(3.0)),
    ],
)
def test_functions_that_differ_by_what_they_hold_are_not_alike(one: Any, other: Any) -> None:
    assert described(_Calls(one)) == described(_Calls(one))
    assert described(_Calls(one)) != described(_Calls(other))

    def called(function: Any) -> str:
        graph = torch.fx.Graph()
        x = graph.placeholder("x")
        graph.output((graph.call_function(function, (x,)),))
        return structure(GraphSegment("a", torch.fx.GraphModule({}, graph), (x,), (), ()), [])

    if not isinstance(one, functools.partial):  # those have no name to be called by in a graph
        assert called(one) == called(one)
        assert called(one) != called(other)


def test_equal_functions_made_twice_are_alike_where_that_can_be_told() -> None:
    first, second = (functools.partial(GELU, approximate="tanh") for _ in range(2))
    assert described(_Calls(first)) == described(_Calls(second))


def test_parameters_have_the_same_order_in_look_alike_blocks(tiny_flux: Tiny) -> None:
    found = {s.name: s for s in segments(lower(trace(*tiny_flux)).graph)}
    one, two = found["transformer_blocks.1"], found["transformer_blocks.2"]
    assert [name.replace("blocks.1.", "blocks.2.") for name in one.parameters] == list(two.parameters)


def test_exports_of_a_run_share_their_translations(tiny_qwen: Tiny, tmp_path: Path) -> None:
    """Else each test would wait seconds for PyTorch: what an export makes, the next one takes."""
    model, kwargs = tiny_qwen
    gm, shared = trace(model, kwargs), exporting.Translations()
    export_graph(gm, tmp_path / "one.onnx", ExportConfig(runs=1))
    made, reused = shared.made, shared.reused
    export_graph(gm, tmp_path / "two.onnx", ExportConfig(runs=1))
    assert shared.made == made and shared.reused == reused + len(segments(lower(gm).graph))
