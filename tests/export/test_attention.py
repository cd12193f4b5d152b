"""Attention as engines take it: masks that are added, or the whole written in products and a softmax."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import nn

from ppcl_fx.calls.examples import floats_as
from ppcl_fx.calls.store import Call, Calls
from ppcl_fx.errors import PpclError
from ppcl_fx.export import ExportConfig, export_graph
from ppcl_fx.export.onnx.segments import Translations
from ppcl_fx.export.onnx.writer import prepare, translated
from ppcl_fx.tracing import trace
from tests.coverage.table import CASES
from tests.export.test_families import FAMILIES

pytestmark = pytest.mark.slow

MASKED = next(case for case in CASES if case.id == "QwenImageTransformer2DModel (padded text)")
MODELS = {name: FAMILIES[name] for name in ("qwen", "flux", "sd3")} | {"masked": MASKED}
ATTENTIONS = {"qwen": 3, "flux": 9, "sd3": 11, "masked": 4}
"""Attentions of each model."""


@pytest.mark.parametrize("name", MODELS)
def test_primitives_give_what_pytorch_gives(name: str, tmp_path: Path) -> None:
    model, kwargs = MODELS[name].build(), MODELS[name].kwargs()
    calls = Calls([Call(kwargs=kwargs, prompts=("a", "b"), timestep=0.5, index=0, batch=2)])
    config = ExportConfig(attention="primitive", tolerance=3e-5, runs=1)
    made = export_graph(trace(model, kwargs), tmp_path / "one.onnx", config, calls=calls)
    assert 0 < made.parity_max_abs < 3e-5  # batch, picture and text changed, too; 1.7e-5 was seen
    graph = ir.load(made.onnx)
    counts = Counter(node.op_type for node in graph.graph)
    assert (counts["Attention"], counts["Softmax"]) == (0, ATTENTIONS[name])
    assert counts["Where"] == (ATTENTIONS[name] if name == "masked" else 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_of_half_precision_is_taken_in_float32(dtype: torch.dtype) -> None:
    counts, _ = written("masked", "primitive", dtype)
    assert (counts["Attention"], counts["Softmax"]) == (0, ATTENTIONS["masked"])
    plain, _ = written("masked", "auto", dtype)
    # The scores to float32, and the weights back.
    assert counts["Cast"] - plain["Cast"] == 2 * ATTENTIONS["masked"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_of_truth_values_becomes_one_that_is_added(dtype: torch.dtype) -> None:
    counts, graph = written("masked", "auto", dtype)
    assert (counts["Attention"], counts["Where"]) == (ATTENTIONS["masked"], ATTENTIONS["masked"])
    masks = [node.inputs[3] for node in graph.graph if node.op_type == "Attention"]
    assert {mask.dtype for mask in masks if mask is not None} == {from_torch_dtype(dtype)}


def written(name: str, attention: Any, dtype: torch.dtype) -> tuple[Counter[str], ir.Model]:
    model = MODELS[name].build().to(dtype)
    kwargs = floats_as(MODELS[name].kwargs(), dtype)
    graph = translated(prepare(trace(model, kwargs), kwargs, 2), Translations(), attention=attention)
    return Counter(node.op_type for node in graph.graph), graph


class Attends(nn.Module):
    def __init__(self, options: dict[str, Any], width: int) -> None:
        super().__init__()
        self.options = options
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        given = (part(hidden_states) for part in (self.to_q, self.to_k, self.to_v))
        query, key, value = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in given)
        found = nn.functional.scaled_dot_product_attention(query, key, value, **self.options)
        return hidden_states + found.transpose(1, 2).flatten(2)


class Toy(nn.Module):
    def __init__(self, options: dict[str, Any], width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attends(options, width)])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


@pytest.mark.parametrize("options", [{"is_causal": True}, {"dropout_p": 0.1}])
def test_what_has_no_primitive_form_is_refused(options: dict[str, Any]) -> None:
    kwargs = {"hidden_states": torch.randn(2, 5, 8)}
    prepared = prepare(trace(Toy(options, 8), kwargs), kwargs, 2)
    with pytest.raises(PpclError, match="attention with dropout, a causal mask or groups of heads is not written"):
        translated(prepared, Translations(), attention="primitive")


@pytest.mark.parametrize("scale", [None, 0.3, 0.25])
def test_scale(scale: float | None, tmp_path: Path) -> None:
    kwargs = {"hidden_states": torch.randn(2, 5, 24)}
    config = ExportConfig(attention="primitive", tolerance=3e-5, runs=1)
    made = export_graph(trace(Toy({"scale": scale}, 24), kwargs), tmp_path / "one.onnx", config)
    counts = Counter(node.op_type for node in ir.load(made.onnx).graph)
    assert counts["Mul"] == (1 if scale == 0.25 else 2)  # a quarter is a power of two
