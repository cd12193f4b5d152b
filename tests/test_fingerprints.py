"""The same model is known again: in another dtype, and with its weights offloaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn

import ppcl_fx
from ppcl_fx.cli.options import Recorded, open_pipeline, open_teacher
from ppcl_fx.cli.terminal import Terminal
from ppcl_fx.errors import PpclError
from ppcl_fx.io.fingerprint import fingerprint
from ppcl_fx.model.rewrite import rewrite
from ppcl_fx.model.sources import open_source
from ppcl_fx.schema.plan import DepthEdit, Plan
from ppcl_fx.shapes.pipeline import ShapesPipeline
from ppcl_fx.tracing import trace
from tests.shapes_folder import save_pipeline

QUIET = Terminal(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shapes") / "model"
    save_pipeline(place, blocks=3)
    return place


def calls_of(pipeline: ShapesPipeline) -> ppcl_fx.Calls:
    return ppcl_fx.record(pipeline, ["a red circle", "two blue squares"], num_inference_steps=1)


def test_offloaded_weights_count_as_they_are(folder: Path, tmp_path: Path, tiny: tuple[nn.Module, object]) -> None:
    model = tiny[0]
    plain = fingerprint(model)
    disk_offload(model, tmp_path / "disk", execution_device="cpu")
    assert any(parameter.is_meta for parameter in model.parameters()) and fingerprint(model) == plain
    pipeline = ShapesPipeline.from_pretrained(folder)
    known = fingerprint(pipeline.transformer)
    cpu_offload(pipeline.transformer, execution_device="cpu")
    assert calls_of(pipeline).model == known
    block = pipeline.transformer.transformer_blocks[0].attn.to_q
    block._hf_hook.weights_map["weight"].mul_(2)
    assert fingerprint(pipeline.transformer) != known, "the weights that the hooks hold are looked at"


def test_calls_of_another_dtype_are_taken_in_that_dtype(folder: Path, tmp_path: Path) -> None:
    half = calls_of(ShapesPipeline.from_pretrained(folder, dtype=torch.bfloat16))
    whole = calls_of(ShapesPipeline.from_pretrained(folder))
    place = tmp_path / "calls"
    for calls, dtype in ((half, torch.bfloat16), (whole, torch.float32)):
        teacher = open_teacher(str(folder), QUIET, {place: calls.model})
        assert teacher.dtype == dtype and fingerprint(teacher) == calls.model
        pipeline = open_pipeline("--pipeline", open_source(str(folder)), place, calls.model, QUIET)
        assert fingerprint(pipeline.transformer) == calls.model
    assert open_teacher(str(folder), QUIET, {place: ""}).dtype == torch.float32
    with pytest.raises(PpclError, match="calls: made for another model than"):
        open_teacher(str(folder), QUIET, {place: "0" * 64})
    plan = Plan(edits=[DepthEdit(stack="transformer_blocks", first=0, last=1)])
    student = rewrite(trace(open_teacher(str(folder), QUIET, {place: whole.model}), whole.examples()), plan)
    student.save(tmp_path / "student")
    Recorded(place, whole).check(tmp_path / "student", student.plan.model)
    with pytest.raises(PpclError, match="recorded in bfloat16, and .* from the same model in another dtype; rewrite"):
        Recorded(place, half).check(tmp_path / "student", student.plan.model)
    with pytest.raises(PpclError, match="recorded from another model than the teacher"):
        Recorded(place, ppcl_fx.Calls(list(half), "0" * 64)).check(tmp_path / "student", student.plan.model)
