"""Exported Qwen-Image, FLUX and SD3 models in their own pipelines, at sizes that were not traced."""

from __future__ import annotations

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
from ppcl_fx.calls import Call, Calls
from ppcl_fx.export import export
from ppcl_fx.passes.rewrite import rewrite
from ppcl_fx.plan import DepthEdit, Plan
from ppcl_fx.tracing import trace
from tests import models

ENCODERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qwen(transformer: Any, batch: int, words: int, height: int, width: int) -> Any:
    """Draw with true guidance: a call with the prompt, and one with the negative prompt, which is shorter."""
    pipeline = QwenImagePipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, **dict.fromkeys(ENCODERS[:2])
    )
    text = {
        "prompt_embeds": normal(batch, words, models.TEXT_CHANNELS, seed=1),
        "prompt_embeds_mask": torch.ones(batch, words, dtype=torch.long),
        "negative_prompt_embeds": normal(batch, words - 2, models.TEXT_CHANNELS, seed=2),
        "negative_prompt_embeds_mask": torch.ones(batch, words - 2, dtype=torch.long),
    }
    return drawn(pipeline, height, width, **text, true_cfg_scale=3.0)


def flux(transformer: Any, batch: int, words: int, height: int, width: int) -> Any:
    """Draw with distilled guidance."""
    parts = dict.fromkeys(ENCODERS[:4])
    pipeline = FluxPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, **parts
    )
    text = {
        "prompt_embeds": normal(batch, words, models.TEXT_CHANNELS, seed=1),
        "pooled_prompt_embeds": normal(batch, models.POOLED_CHANNELS, seed=2),
    }
    return drawn(pipeline, height, width, **text, guidance_scale=3.5)


def sd3(transformer: Any, batch: int, words: int, height: int, width: int) -> Any:
    """Draw with both branches of guidance in one batch."""
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, **dict.fromkeys(ENCODERS)
    )
    text = {
        "prompt_embeds": normal(batch, words, models.TEXT_CHANNELS, seed=1),
        "negative_prompt_embeds": normal(batch, words, models.TEXT_CHANNELS, seed=2),
        "pooled_prompt_embeds": normal(batch, models.POOLED_CHANNELS, seed=3),
        "negative_pooled_prompt_embeds": normal(batch, models.POOLED_CHANNELS, seed=4),
    }
    return drawn(pipeline, height, width, **text, guidance_scale=5.0)


def drawn(pipeline: Any, height: int, width: int, **text: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        height=height, width=width, num_inference_steps=2, generator=generator, output_type="latent", **text
    ).images


def calls_of(teacher: nn.Module, draw: Any) -> Calls:
    """Return the first call that the pipeline makes."""
    seen: list[dict[str, Any]] = []
    hook = teacher.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
    draw(teacher, 1, 5, 64, 64)
    hook.remove()
    batch = len(seen[0]["hidden_states"])
    return Calls([Call(kwargs=seen[0], prompts=("a",) * batch, timestep=0.5, index=0, batch=batch)])


@pytest.mark.parametrize(
    ("draw", "build", "first"), [(qwen, models.tiny_qwen, 0), (flux, models.tiny_flux, 1), (sd3, models.tiny_sd3, 0)]
)
def test_its_own_pipeline_gives_the_same_latents(draw: Any, build: Any, first: int, tmp_path: Path) -> None:
    teacher, _ = build(blocks=3) if draw is qwen else build()
    calls = calls_of(teacher, draw)
    edit = DepthEdit(stack="transformer_blocks", first=first, last=first + 1)
    model = rewrite(trace(teacher, calls[0].kwargs), Plan(edits=[edit])).eval()
    model.plug(students=model.edits)
    keep = round(model.param_count() / model.teacher_params + 0.005, 2)
    export(model, [keep], tmp_path / "engines", calls=calls, runs=1)
    model.plug(keep=keep)
    assert model.students == tuple(model.edits)
    engine = EngineTransformer(tmp_path / "engines", device="cpu")
    assert engine.students == model.students
    for sizes in ((1, 5, 64, 64), (2, 8, 96, 64)):
        expected, latents = draw(model, *sizes), draw(engine, *sizes)
        assert expected.isfinite().all()
        assert latents.shape == expected.shape
        assert torch.allclose(latents, expected, atol=1e-4)
    assert engine.backend == "onnxruntime"
