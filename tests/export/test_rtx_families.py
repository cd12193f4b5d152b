"""Engines of Qwen-Image, FLUX, SD3.5 and Chroma, whole and pruned, built by NVIDIA's own compiler without a GPU."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from torch.fx import GraphModule

import ppcl_fx
from ppcl_fx.calls.examples import floats_as
from ppcl_fx.calls.store import Call, Calls
from ppcl_fx.export import ExportConfig, Translations, export, export_graph
from ppcl_fx.export.runtime.folder import artefacts
from ppcl_fx.export.tensorrt.build import build_engine
from ppcl_fx.export.tensorrt.manifest import EngineManifest
from ppcl_fx.export.tensorrt.options import BuildOptions
from ppcl_fx.export.tensorrt.profiles import Spec
from ppcl_fx.export.tensorrt.request import BuildConfig, EngineConfig
from ppcl_fx.export.tensorrt_api import load_builder
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.model.rewrite import rewrite
from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, Plan, TextStreamEdit
from ppcl_fx.shapes import load_pipeline
from ppcl_fx.tracing import trace
from tests.coverage.case import EXAMPLE
from tests.export.test_families import FAMILIES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        # The libraries come with the extra [dev], but for macOS.
        importlib.util.find_spec("tensorrt_rtx_bindings") is None,
        reason="needs the packages tensorrt-rtx-cu13-libs and -bindings",
    ),
]
QUICK = BuildOptions(gpu=("8.9",), level=0)
STACK = "transformer_blocks"
STUDENTS: dict[str, Edit | None] = {
    "teacher": None,
    "depth": DepthEdit(stack=STACK, first=1, last=2),
    "feed-forward": FfnEdit(stack=STACK, block=0),
    "text stream": TextStreamEdit(stack=STACK, source=0, last=1),
}

@functools.cache
def traced(name: str) -> tuple[GraphModule, Calls, Translations]:
    """Return a family's teacher, traced in bfloat16."""
    case = FAMILIES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers' Chroma uses a name that diffusers has moved
        model = case.build()
    kwargs = floats_as(case.kwargs(), torch.bfloat16)
    calls = Calls([Call(kwargs=kwargs, prompts=("a", "b"), timestep=0.5, index=0, batch=EXAMPLE.batch)])
    return trace(model.to(torch.bfloat16), kwargs), calls, Translations()


def build(onnx: Path) -> EngineManifest:
    """Build an engine for several pictures, texts and batches."""
    request = BuildConfig(spec=Spec(batch="1-4", tokens="4-64", text="1-16"), library="rtx")
    api = load_builder("", "rtx")
    return build_engine(onnx, onnx.with_suffix(".engine"), request.profiles(onnx), QUICK, api=api)


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_an_engine_is_built(name: str, student: str, tmp_path: Path) -> None:
    teacher, calls, known = traced(name)
    edit = STUDENTS[student]
    graph = teacher
    if edit is not None:
        model = rewrite(teacher, Plan(edits=[edit]))
        graph = model.plug(students=model.edits).graph_module()
    exported = export_graph(graph, tmp_path / "one.onnx", ExportConfig(runs=1), calls=calls, known=known)
    card = build(exported.onnx)
    assert (card.dtype, card.library, card.capabilities) == ("bfloat16", "rtx", ["8.9"])
    weights = exported.onnx.stat().st_size
    assert weights < card.engine.bytes < weights + 2**25, name
    assert card.layers is not None and card.layers > 100


RATIOS = (1.0, 0.7, 0.6, 0.5)
WAYS = {
    "bf16": ExportConfig(dtype="bf16"),
    "fp16": ExportConfig(dtype="fp16"),
    "fp32": ExportConfig(dtype="fp32"),
    "INT4": ExportConfig(dtype="bf16", weights="int4"),
}
"""How `shapes` is built at every ratio."""
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float", "INT4": "bfloat16"}


@pytest.fixture(scope="module")
def shapes() -> tuple[PluggableModel, Calls, Translations]:
    """The shipped model with edits of each kind, and a call of it."""
    pipeline = load_pipeline()
    calls = ppcl_fx.record(pipeline, ["a red circle", "two blue squares"], num_inference_steps=1)
    edits = [
        *(DepthEdit(stack=STACK, first=one, last=last) for one, last in ((4, 6), (7, 9), (10, 12), (13, 14))),
        TextStreamEdit(stack=STACK, source=0, last=2),
        FfnEdit(stack=STACK, block=0),
    ]
    model = rewrite(trace(pipeline.transformer, calls[0].kwargs), Plan(edits=edits))
    return model, calls, Translations()


@pytest.mark.parametrize("way", WAYS)
def test_shapes_has_an_engine_at_each_ratio(
    shapes: tuple[PluggableModel, Calls, Translations], way: str, tmp_path: Path
) -> None:
    model, calls, known = shapes
    own = {"keep": RATIOS, "format": "rtx", "runs": 1, "check_calls": 1, "build": EngineConfig(options=QUICK)}
    done = export(model, tmp_path, WAYS[way].model_copy(update=own), calls=calls, known=known)
    assert [one.name for one in done.engines] == ["keep-1", "keep-0.7", "keep-0.6", "keep-0.5"]
    for ratio, one in zip(done.ratios, done.engines, strict=True):
        assert one.engine == ratio.engine == ratio.onnx.with_suffix(".engine") and one.engine.is_file()
        assert (one.manifest.library, one.manifest.onnx) == ("rtx", ratio.onnx.name)
        assert one.manifest.dtype == DTYPES[way]
    sizes = [one.manifest.engine.bytes for one in done.engines]
    assert sizes == sorted(sizes, reverse=True)
    found = artefacts(tmp_path)
    assert [found[keep].engine for keep in RATIOS] == [one.engine for one in done.engines]
