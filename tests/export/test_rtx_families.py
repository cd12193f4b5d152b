"""Engines of Qwen-Image, FLUX, SD3.5 and Chroma, whole and pruned, built by NVIDIA's own compiler without a GPU."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import pytest
import torch
from torch.fx import GraphModule

from ppcl_fx.calls.examples import floats_as
from ppcl_fx.calls.store import Call, Calls
from ppcl_fx.export import ExportConfig, export_graph
from ppcl_fx.export.tensorrt.build import build_engine
from ppcl_fx.export.tensorrt.manifest import EngineManifest
from ppcl_fx.export.tensorrt.options import BuildOptions
from ppcl_fx.export.tensorrt.profiles import Spec
from ppcl_fx.export.tensorrt.request import BuildConfig
from ppcl_fx.export.tensorrt_api import load_builder
from ppcl_fx.model.rewrite import rewrite
from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, Plan, TextStreamEdit
from ppcl_fx.tracing import trace
from tests.coverage.case import EXAMPLE
from tests.export.compiler import NEEDS
from tests.export.test_families import FAMILIES

pytestmark = [pytest.mark.slow, NEEDS]
QUICK = BuildOptions(gpu=("8.9",), level=0)
STACK = "transformer_blocks"
STUDENTS: dict[str, Edit | None] = {
    "teacher": None,
    "depth": DepthEdit(stack=STACK, first=1, last=2),
    "feed-forward": FfnEdit(stack=STACK, block=0),
    "text stream": TextStreamEdit(stack=STACK, source=0, last=1),
}

@functools.cache
def traced(name: str) -> tuple[GraphModule, Calls]:
    """Return a family's teacher, traced in bfloat16."""
    case = FAMILIES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers' Chroma uses a name that diffusers has moved
        model = case.build()
    kwargs = floats_as(case.kwargs(), torch.bfloat16)
    calls = Calls([Call(kwargs=kwargs, prompts=("a", "b"), timestep=0.5, index=0, batch=EXAMPLE.batch)])
    return trace(model.to(torch.bfloat16), kwargs), calls


def build(onnx: Path, latents: bool) -> EngineManifest:
    """Build an engine for several pictures, of tokens or of latents, texts and batches."""
    size = {"shapes": "32x32-64x64", "pixels": 8} if latents else {"tokens": "4-64"}
    spec = Spec.model_validate({"batch": "1-4", "text": "1-16", **size})
    request = BuildConfig(spec=spec, library="rtx")
    api = load_builder("", "rtx")
    return build_engine(onnx, onnx.with_suffix(".engine"), request.profiles(onnx), QUICK, api=api)


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_an_engine_is_built(name: str, student: str, tmp_path: Path) -> None:
    teacher, calls = traced(name)
    edit = STUDENTS[student]
    graph = teacher
    if edit is not None:
        model = rewrite(teacher, Plan(edits=[edit]))
        graph = model.plug(students=model.edits).graph_module()
    exported = export_graph(graph, tmp_path / "one.onnx", ExportConfig(runs=1), calls=calls)
    card = build(exported.onnx, calls[0].kwargs["hidden_states"].ndim == 4)
    assert (card.dtype, card.library, card.capabilities) == ("bfloat16", "rtx", ["8.9"])
    weights = exported.onnx.stat().st_size
    assert weights < card.engine.bytes < weights + 2**25, name
    assert card.layers is not None and card.layers > 100
