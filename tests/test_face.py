"""What stock pipelines read from a transformer beside calling it: answered as the teacher's class does."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
)
from torch import nn

import ppcl_fx
from ppcl_fx.errors import GuardError, PpclError
from ppcl_fx.model.rewrite import rewrite
from ppcl_fx.schema.plan import DepthEdit, Edit, Plan
from ppcl_fx.tracing import trace
from tests import models, toys
from tests.coverage.case import Case
from tests.coverage.table import CASES
from tests.pipeline_reads import pipeline_reads

pytestmark = pytest.mark.slow

READS = functools.cache(pipeline_reads)
STACK = "transformer_blocks"
ABSENT = "no such attribute"
OWN = {"__class__", "cache_context", "config", "dtype", "forward", "named_modules", "parameters"}
"""What a pluggable model says for itself."""


def asked(model: Any, name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # entries of the configuration, read from the model itself
        try:
            return getattr(model, name)
        except AttributeError:
            return ABSENT


def alike(found: Any, wanted: Any) -> bool:
    """Tell whether two answers are the same: numbers, modules with the same tensors, processors of the same classes."""
    if isinstance(wanted, nn.Module):
        there, here = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (wanted, found))
        if type(found) is not type(wanted) or here.keys() != there.keys():
            return False
        # What the traced call did not use has no values.
        return all(t.shape == there[n].shape and (t.is_meta or torch.equal(t, there[n])) for n, t in here.items())
    if inspect.ismethod(wanted):
        return callable(found)
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(type(v) is type(wanted[k]) for k, v in found.items())
    return type(found) is type(wanted) and bool(found == wanted)


def test_the_scan_finds_what_pipelines_are_known_to_read() -> None:
    assert {"in_channels", "rope", "inner_dim", "max_seq", "dtype", "cache_context", "head_dim"} <= READS().names.keys()
    assert {"in_channels", "patch_size", "guidance_embeds"} <= READS().config.keys()
    assert any(name.startswith("pipeline_wan") for name in READS().names["cache_context"])  # by a local name


@pytest.mark.filterwarnings("ignore")  # the models' own
@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_every_attribute_that_a_pipeline_reads_is_answered_as_the_teacher_does(case: Case, tmp_path: Path) -> None:
    teacher: Any = case.build()
    model = ppcl_fx.PluggableModel(trace(teacher, case.kwargs()), Plan())
    names = [name for name in READS().names if name not in OWN]
    odd = {name: (asked(model, name), asked(teacher, name)) for name in names}
    assert {name: both for name, both in odd.items() if not alike(*both)} == {}
    teacher.save_config(tmp_path)
    config = type(teacher).load_config(tmp_path)  # with lists in the place of tuples
    assert {n: asked(model.config, n) for n in READS().config} == {n: config.get(n, ABSENT) for n in READS().config}
    assert model.dtype == teacher.dtype


def qwen_model(edits: list[Edit]) -> tuple[Any, ppcl_fx.PluggableModel, dict[str, Any]]:
    teacher, kwargs = models.tiny_qwen()
    return teacher, rewrite(trace(teacher, kwargs), Plan(edits=edits)), kwargs


def answer(model: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        result = model(**{**kwargs, "return_dict": False})[0]
    assert isinstance(result, torch.Tensor)
    return result


EDITS: list[Edit] = [DepthEdit(stack=STACK, first=1, last=3)]


@pytest.mark.filterwarnings("ignore:Accessing config attribute")
def test_answers_survive_saving_moving_and_copying(tmp_path: Path) -> None:
    teacher, model, kwargs = qwen_model(EDITS)
    model.plug(students=model.edits)
    for one in (model, ppcl_fx.load(model.save(tmp_path / "student")), copy.deepcopy(model)):
        assert (one.in_channels, one.inner_dim, len(one.transformer_blocks)) == (16, 32, 6)
        assert one.transformer_blocks[2].img_mlp.net[2].weight is one.graph.get_parameter(
            "transformer_blocks.2.img_mlp.net.2.weight"
        )
        assert type(one.pos_embed) is type(teacher.pos_embed)
        assert torch.equal(one.pos_embed.pos_freqs, teacher.pos_embed.pos_freqs)
    model.to(torch.bfloat16)
    assert model.transformer_blocks[2].attn.to_q.weight.dtype == model.dtype == torch.bfloat16
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    kwargs = {k: v.bfloat16() if isinstance(v, torch.Tensor) and k != "timestep" else v for k, v in kwargs.items()}
    kwargs["timestep"] = kwargs["timestep"].bfloat16()
    expected = answer(model, kwargs)
    assert torch.equal(answer(compiled, kwargs), expected)


def test_a_class_that_diffusers_does_not_know_has_no_more_than_it_says() -> None:
    plan = Plan(edits=[DepthEdit(stack="blocks", first=0, last=1)])
    model = rewrite(trace(toys.build(toys.Toy), toys.example()), plan)
    with pytest.raises(AttributeError, match="'PluggableModel' object has no attribute 'in_channels'"):
        _ = model.in_channels
    assert not hasattr(model, "rope")


def test_a_change_that_would_do_nothing_is_refused() -> None:
    teacher, kwargs = models.tiny_flux()
    model = rewrite(trace(teacher, kwargs), Plan(edits=EDITS))
    expected = answer(model, kwargs)
    changes: dict[str, list[Any]] = {"enable_cache": [FirstBlockCacheConfig(threshold=0.1)], "fuse_qkv_projections": []}
    for name, arguments in changes.items():
        with pytest.raises(PpclError, match=rf"{name}\(\) changes '.*' of the transformer's class, and a pluggable"):
            getattr(model, name)(*arguments)
    assert not model.is_cache_enabled
    model._reset_stateful_cache()  # pipelines call it at their end
    model.set_attn_processor(model.attn_processors)
    assert torch.equal(answer(model, kwargs), expected)
    hook = model.transformer_blocks[0].register_forward_hook(lambda *_: torch.zeros(1))
    with pytest.raises(PpclError, match=r"somebody changed 'transformer_blocks.0._forward_hooks\[\d+\]'"):
        model(**kwargs)
    hook.remove()
    model.single_transformer_blocks[1].attn.processor = None
    with pytest.raises(PpclError, match=r"somebody changed 'single_transformer_blocks.1.attn.processor'"):
        model.to("cpu")(**kwargs)
    assert torch.equal(answer(model, kwargs), expected)


# ---- stock pipelines -------------------------------------------------------------------------------------------


def drawn(pipeline: Any, **kwargs: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(**kwargs, output_type="latent", generator=torch.Generator().manual_seed(0))[0]
    assert isinstance(result, torch.Tensor)
    return result


def test_the_wan_pipeline_tells_where_its_loop_stands() -> None:
    torch.manual_seed(0)
    teacher = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=16, freq_dim=16, ffn_dim=32, num_layers=3, cross_attn_norm=True, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    pipeline = WanPipeline(None, None, vae, FlowMatchEulerDiscreteScheduler(), teacher)
    text = [torch.randn(1, 6, 16) for _ in range(2)]
    kwargs = {"prompt_embeds": text[0], "negative_prompt_embeds": text[1], "height": 16, "width": 16, "num_frames": 5}
    kwargs |= {"num_inference_steps": 2, "guidance_scale": 4.0}
    calls = ppcl_fx.record(pipeline, ["a"], **kwargs)
    model = rewrite(trace(teacher, calls.examples()), Plan(edits=[DepthEdit(stack="blocks", first=0, last=1)]))
    expected = drawn(pipeline, **kwargs)
    pipeline.transformer = model
    assert torch.equal(drawn(pipeline, **kwargs), expected)
    model.plug(students=model.edits)
    assert not torch.equal(drawn(pipeline, **kwargs), expected)


@pytest.mark.parametrize("guidance", [0.0, 5.0])
def test_the_z_image_pipeline_draws_the_teacher_s_picture_or_says_what_was_traced(guidance: float) -> None:
    teacher: Any = next(case for case in CASES if case.name == "ZImageTransformer2DModel").build()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False, shift=3.0)
    pipeline = ZImagePipeline(scheduler, None, None, None, teacher)
    pipeline.vae_scale_factor = 8
    generator = torch.Generator().manual_seed(1)

    def texts(*lengths: int) -> list[torch.Tensor]:
        return [torch.randn(length, models.TEXT_CHANNELS, generator=generator) for length in lengths]

    sizes = {"height": 128, "width": 128, "num_inference_steps": 2, "guidance_scale": guidance}
    given = {"prompt_embeds": texts(7), "negative_prompt_embeds": texts(40), **sizes}
    others = {
        "other lengths": {"prompt_embeds": texts(33), "negative_prompt_embeds": texts(3), **sizes},
        "two of unequal length": {"prompt_embeds": texts(7, 50), "negative_prompt_embeds": texts(40, 3), **sizes},
    }
    calls = ppcl_fx.record(pipeline, ["a"], output_type="latent", **given)
    model = ppcl_fx.PluggableModel(trace(teacher, calls.examples()), Plan())
    expected = {name: drawn(pipeline, **other) for name, other in others.items()}
    first = drawn(pipeline, **given)
    pipeline.transformer = model
    assert torch.equal(drawn(pipeline, **given), first)
    for name, other in others.items():
        try:
            found = drawn(pipeline, **other)
        except GuardError:
            continue  # said, not wrong
        assert torch.equal(found, expected[name]), name
