"""Engines of the shipped model at each ratio in every type, built by NVIDIA's own compiler without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

import ppcl_fx
from ppcl_fx.calls.store import Calls
from ppcl_fx.export import ExportConfig, export
from ppcl_fx.export.runtime.folder import artefacts
from ppcl_fx.export.tensorrt.request import EngineConfig
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.model.rewrite import rewrite
from ppcl_fx.schema.plan import DepthEdit, FfnEdit, Plan, TextStreamEdit
from ppcl_fx.shapes import load_pipeline
from ppcl_fx.tracing import trace
from tests.export.compiler import NEEDS
from tests.export.test_rtx_families import QUICK, STACK

pytestmark = [pytest.mark.slow, NEEDS]

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
def shapes() -> tuple[PluggableModel, Calls]:
    """The shipped model with edits of each kind, and a call of it."""
    pipeline = load_pipeline()
    calls = ppcl_fx.record(pipeline, ["a red circle", "two blue squares"], num_inference_steps=1)
    edits = [
        *(DepthEdit(stack=STACK, first=one, last=last) for one, last in ((4, 6), (7, 9), (10, 12), (13, 14))),
        TextStreamEdit(stack=STACK, source=0, last=2),
        FfnEdit(stack=STACK, block=0),
    ]
    model = rewrite(trace(pipeline.transformer, calls[0].kwargs), Plan(edits=edits))
    return model, calls


@pytest.mark.parametrize("way", WAYS)
def test_shapes_has_an_engine_at_each_ratio(
    shapes: tuple[PluggableModel, Calls], way: str, tmp_path: Path
) -> None:
    model, calls = shapes
    own = {"keep": RATIOS, "format": "rtx", "runs": 1, "check_calls": 1, "build": EngineConfig(options=QUICK)}
    done = export(model, tmp_path, WAYS[way].model_copy(update=own), calls=calls)
    assert [one.name for one in done.engines] == ["keep-1", "keep-0.7", "keep-0.6", "keep-0.5"]
    for ratio, one in zip(done.ratios, done.engines, strict=True):
        assert one.engine == ratio.engine == ratio.onnx.with_suffix(".engine") and one.engine.is_file()
        assert (one.manifest.library, one.manifest.onnx) == ("rtx", ratio.onnx.name)
        assert one.manifest.dtype == DTYPES[way]
    sizes = [one.params for one in done.ratios]
    assert sizes == sorted(sizes, reverse=True)
    found = artefacts(tmp_path)
    assert [found[keep].engine for keep in RATIOS] == [one.engine for one in done.engines]
