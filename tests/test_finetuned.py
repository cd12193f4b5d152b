"""`ppcl_fx.load(STUDENT/finetuned)`: a fine-tuned model in the place of a stock pipeline's transformer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModelMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

import ppcl_fx
from ppcl_fx.model.mixtures import mixture
from ppcl_fx.model.student_folder import save_finetuned
from ppcl_fx.schema.plan import DepthEdit, Plan
from ppcl_fx.shapes.pipeline import ShapesPipeline
from ppcl_fx.tracing import trace
from tests import models
from tests.export.test_runtime_families import drawn, flux
from tests.shapes_folder import save_pipeline

pytestmark = pytest.mark.slow

Draw = Callable[[Any], torch.Tensor]


def shapes(folder: Path) -> tuple[nn.Module, dict[str, Any], Draw]:
    """A small pipeline of pictures: its transformer, a call, and how a model in its place draws."""
    place = save_pipeline(folder / "pipeline")
    pipeline = ShapesPipeline.from_pretrained(place)
    pipeline.set_progress_bar_config(disable=True)
    calls = ppcl_fx.record(pipeline, ["a red circle"], num_inference_steps=1)

    def draw(model: Any) -> torch.Tensor:
        whole = ShapesPipeline.from_pretrained(place, transformer=model)
        whole.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        found = whole("two blue squares", num_inference_steps=2, generator=noise, output_type="pt").images
        assert isinstance(found, torch.Tensor)
        return found

    return pipeline.transformer, calls.examples(), draw


def flux_latents(folder: Path) -> tuple[nn.Module, dict[str, Any], Draw]:
    """A small FLUX in diffusers' own pipeline, at a size and a text length that were not traced."""
    teacher, kwargs = models.tiny_flux()
    return teacher, kwargs, lambda model: drawn(flux(model, 1, 9), 64, 96)


@pytest.mark.parametrize("family", [shapes, flux_latents])
def test_a_stock_pipeline_draws_with_it(family: Any, tmp_path: Path) -> None:
    teacher, kwargs, draw = family(tmp_path)
    plan = Plan(edits=[DepthEdit(stack="transformer_blocks", first=1, last=2)])
    model = ppcl_fx.rewrite(trace(teacher, kwargs), plan)
    model.save(tmp_path / "student")
    save_finetuned(mixture(model, model.edits), model, model.edits, tmp_path / "student" / "finetuned")
    loaded: Any = ppcl_fx.load(tmp_path / "student" / "finetuned")
    assert isinstance(loaded, ModelMixin) and loaded.config.in_channels == teacher.config.in_channels
    assert loaded.dtype == torch.float32 and loaded.param_count() == model.param_count(model.edits)
    with torch.no_grad():
        whole, parts = loaded(**{**kwargs, "return_dict": True}), loaded(**{**kwargs, "return_dict": False})
    assert isinstance(whole, Transformer2DModelOutput) and torch.equal(whole.sample, parts[0])
    # Its weights are those that the mixture had: the same pictures, to the bit, and not the teacher's.
    assert torch.equal(draw(loaded), draw(model.plug(students=model.edits)))
    assert not torch.equal(draw(loaded), draw(model.plug(students=[])))
    half: Any = ppcl_fx.load(tmp_path / "student" / "finetuned", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    # Tuned further, it draws something else.
    tuned = mixture(model, model.edits)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.1)
    save_finetuned(tuned, model, model.edits, tmp_path / "student" / "finetuned")
    assert not torch.equal(draw(ppcl_fx.load(tmp_path / "student" / "finetuned")), draw(loaded))
