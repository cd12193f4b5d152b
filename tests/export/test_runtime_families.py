"""Exported Qwen-Image, FLUX and SD3 models in their own pipelines, at sizes that were not traced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
)
from torch import nn

from ppcl_fx import EngineTransformer
from ppcl_fx.calls.store import Call, Calls
from ppcl_fx.export import ExportConfig, Exported, Manifest, SamplingRun, export
from ppcl_fx.export.store.names import manifest_path
from ppcl_fx.io.files import read_json
from ppcl_fx.model.rewrite import rewrite
from ppcl_fx.schema.plan import DepthEdit, Plan
from ppcl_fx.tracing import trace
from tests import models

pytestmark = pytest.mark.slow

Drawing = tuple[Any, dict[str, Any]]
"""A pipeline, and the arguments that it draws with."""

Family = Callable[[Any, int, int], Drawing]
"""Builds one around a transformer, for so many samples and words."""

ENCODERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qwen(transformer: Any, batch: int, words: int) -> Drawing:
    """With true guidance: a call with the prompt, and one with the negative prompt, which is shorter."""
    pipeline = QwenImagePipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, **dict.fromkeys(ENCODERS[:2])
    )
    text = {
        "prompt_embeds": normal(batch, words, models.TEXT_CHANNELS, seed=1),
        "prompt_embeds_mask": torch.ones(batch, words, dtype=torch.long),
        "negative_prompt_embeds": normal(batch, words - 2, models.TEXT_CHANNELS, seed=2),
        "negative_prompt_embeds_mask": torch.ones(batch, words - 2, dtype=torch.long),
    }
    return pipeline, {**text, "true_cfg_scale": 3.0}


def flux(transformer: Any, batch: int, words: int) -> Drawing:
    """With distilled guidance."""
    parts = dict.fromkeys(ENCODERS[:4])
    pipeline = FluxPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, **parts
    )
    text = {
        "prompt_embeds": normal(batch, words, models.TEXT_CHANNELS, seed=1),
        "pooled_prompt_embeds": normal(batch, models.POOLED_CHANNELS, seed=2),
    }
    return pipeline, {**text, "guidance_scale": 3.5}


def sd3(transformer: Any, batch: int, words: int) -> Drawing:
    """With both branches of guidance in one batch."""
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, **dict.fromkeys(ENCODERS)
    )
    text = {
        "prompt_embeds": normal(batch, words, models.TEXT_CHANNELS, seed=1),
        "negative_prompt_embeds": normal(batch, words, models.TEXT_CHANNELS, seed=2),
        "pooled_prompt_embeds": normal(batch, models.POOLED_CHANNELS, seed=3),
        "negative_pooled_prompt_embeds": normal(batch, models.POOLED_CHANNELS, seed=4),
    }
    return pipeline, {**text, "guidance_scale": 5.0}


def sized(height: int, width: int) -> dict[str, Any]:
    return {"height": height, "width": width, "output_type": "latent"}


def drawn(drawing: Drawing, height: int, width: int) -> Any:
    pipeline, arguments = drawing
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(num_inference_steps=2, generator=generator, **sized(height, width), **arguments).images


def calls_of(teacher: nn.Module, family: Family) -> Calls:
    """Return the first call that the pipeline makes."""
    seen: list[dict[str, Any]] = []
    hook = teacher.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
    drawn(family(teacher, 1, 5), 64, 64)
    hook.remove()
    batch = len(seen[0]["hidden_states"])
    return Calls([Call(kwargs=seen[0], prompts=("a",) * batch, timestep=0.5, index=0, batch=batch)])


def run_of(family: Family) -> SamplingRun:
    """Two prompts at another resolution and text length than traced; the pipeline has no transformer of its own."""
    pipeline, arguments = family(None, 2, 8)
    return SamplingRun(pipeline, ["a", "b"], steps=2, arguments={**sized(96, 64), **arguments})


@pytest.mark.parametrize(
    ("family", "build", "first"), [(qwen, models.tiny_qwen, 0), (flux, models.tiny_flux, 1), (sd3, models.tiny_sd3, 0)]
)
def test_its_own_pipeline_gives_the_same_latents(family: Family, build: Any, first: int, tmp_path: Path) -> None:
    teacher, _ = build(blocks=3) if family is qwen else build()
    calls = calls_of(teacher, family)
    edit = DepthEdit(stack="transformer_blocks", first=first, last=first + 1)
    model = rewrite(trace(teacher, calls[0].kwargs), Plan(edits=[edit])).eval()
    model.plug(students=model.edits)
    keep = round(model.param_count() / model.teacher_params + 0.005, 2)
    (made,) = export(
        model, tmp_path / "engines", ExportConfig(keep=(keep,), runs=1), calls=calls, sampling=run_of(family)
    ).ratios
    check_gate(made, 4 if family is qwen else 2)  # Qwen-Image's two steps call twice each, for guidance
    model.plug(keep=keep)
    assert model.students == tuple(model.edits)
    engine = EngineTransformer(tmp_path / "engines", device="cpu")
    assert engine.students == model.students
    for batch, words, height, width in ((1, 5, 64, 64), (2, 8, 96, 64)):
        expected, latents = (drawn(family(one, batch, words), height, width) for one in (model, engine))
        assert expected.isfinite().all()
        assert latents.shape == expected.shape
        assert torch.allclose(latents, expected, atol=1e-4)
    assert engine.backend == "onnxruntime"


def check_gate(made: Exported, transformer_calls: int) -> None:
    """The export compared the recorded call and the run, and its manifest says so."""
    gate = read_json(manifest_path(made.onnx), Manifest).gate
    assert gate is not None and gate == made.gate
    assert gate.not_checked == [] and made.unchecked is None
    assert gate.calls is not None and gate.sampling is not None
    assert gate.calls.compared == 1 and 0 < gate.calls.relative < 1e-5 and gate.calls.cosine > 0.999999
    assert (gate.sampling.compared, gate.sampling.transformer_calls) == (2, transformer_calls)
    assert 0 < gate.sampling.relative < 1e-4 and gate.sampling.cosine > 0.999999 and gate.sampling.max_abs < 1e-3
    assert (gate.sampling.score, gate.sampling.score_pytorch) == (None, None)
