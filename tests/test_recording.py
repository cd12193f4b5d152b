"""Recording: every call of any pipeline's transformer, replayable to the bit, and the pipeline as it was."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPlusPipeline,
    WanPipeline,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image

from ppcl_fx.calls import record as recording
from ppcl_fx.calls.record import record
from ppcl_fx.calls.store import Calls, collate
from ppcl_fx.errors import PpclError
from ppcl_fx.io.fingerprint import fingerprint
from ppcl_fx.shapes.captions import MAX_WORDS
from tests.small_pipelines import (
    WORDS,
    flux,
    noise,
    outputs,
    qwen,
    run,
    sd3,
    shapes,
    small_qwen,
    small_qwen_vae,
    small_vae,
    small_wan,
    small_wan_vae,
)

# Calls a step: Qwen-Image calls once a branch, FLUX has no second branch, SD3 puts both in one batch.
MODELS = [
    pytest.param(qwen, 2, 1, id="qwen"),
    pytest.param(flux, 1, 1, id="flux"),
    pytest.param(sd3, 1, 2, id="sd3"),
]


@pytest.mark.parametrize(("build", "branches", "per_prompt"), MODELS)
def test_every_call_is_recorded_and_replays_to_the_bit(build: Any, branches: int, per_prompt: int) -> None:
    pipeline, kwargs = build()
    seen, handle = outputs(pipeline.transformer)
    calls = record(pipeline, ["a", "b", "c"], batch_size=2, num_inference_steps=3, **kwargs)
    handle.remove()
    assert len(calls) == len(seen) == 2 * 3 * branches
    assert [call.index for call in calls] == list(range(len(calls)))
    assert [call.prompts for call in calls] == [("a", "b")] * 3 * branches + [("c",)] * 3 * branches
    assert [call.batch for call in calls] == [n * per_prompt for n in [2, 1] for _ in range(3 * branches)]
    assert [call.branch for call in calls] == list(range(branches)) * 6
    assert len({call.timestep for call in calls}) == 3
    for call, output in zip(calls, seen, strict=True):
        assert torch.equal(run(call, pipeline.transformer), output)
        assert call.kwargs["return_dict"] is False and None not in call.kwargs.values()
        assert call.timestep == float(call.kwargs["timestep"][0])
    assert calls.model == fingerprint(pipeline.transformer)


@pytest.mark.parametrize(("build", "branches", "per_prompt"), MODELS)
def test_saved_calls_are_the_recorded_ones(
    tmp_path: Path, build: Any, branches: int, per_prompt: int
) -> None:
    pipeline, kwargs = build()
    calls = record(pipeline, ["a", "b", "c"], batch_size=2, num_inference_steps=2, **kwargs)
    calls.save(tmp_path / "calls")
    opened = Calls.open(tmp_path / "calls")
    assert opened.fingerprint == calls.fingerprint and opened.model == calls.model
    for call, again in zip(calls, opened, strict=True):
        assert torch.equal(run(call, pipeline.transformer), run(again, pipeline.transformer))
    if build is qwen:
        assert opened[0].kwargs["img_shapes"] == [[(1, 2, 3)]] * 2
        assert isinstance(opened[0].kwargs["img_shapes"][0][0], tuple)


@pytest.mark.parametrize(("build", "branches", "per_prompt"), MODELS)
def test_joined_calls_answer_like_each_alone(build: Any, branches: int, per_prompt: int) -> None:
    pipeline, kwargs = build()
    calls = record(pipeline, ["a", "b", "c"], batch_size=2, num_inference_steps=2, **kwargs)
    pair = [calls[0], calls[2 * branches]]
    assert [call.batch for call in pair] == [2 * per_prompt, per_prompt]
    with torch.no_grad():
        together = pipeline.transformer(**collate(pair))[0]
    apart = torch.cat([run(call, pipeline.transformer) for call in pair])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


def test_the_shapes_pipeline() -> None:
    pipeline = shapes()
    calls = record(pipeline, [WORDS[0], WORDS[1]], num_inference_steps=2)
    assert len(calls) == 4 and [call.branch for call in calls] == [0, 1, 0, 1]
    blank = calls[1].kwargs["encoder_hidden_states"]
    assert blank.shape == (2, MAX_WORDS, 12) and torch.equal(blank[0], blank[1])
    assert calls[0].kwargs["hidden_states"] is calls[1].kwargs["hidden_states"], "equal tensors are kept once"
    default = inspect.signature(pipeline.__call__).parameters["num_inference_steps"].default
    assert len(record(pipeline, WORDS[0], guidance_scale=1.0)) == default


def test_noise_belongs_to_the_prompt_and_not_to_the_batch() -> None:
    pipeline = shapes()
    whole = record(pipeline, WORDS[:3], num_inference_steps=1, guidance_scale=1.0)
    single = record(pipeline, WORDS[:3], num_inference_steps=1, guidance_scale=1.0, batch_size=1)
    assert len(whole) == 1 and len(single) == 3
    assert torch.equal(
        whole[0].kwargs["hidden_states"], torch.cat([call.kwargs["hidden_states"] for call in single])
    )
    other = record(pipeline, WORDS[:3], num_inference_steps=1, guidance_scale=1.0, seed=7)
    assert not torch.equal(whole[0].kwargs["hidden_states"], other[0].kwargs["hidden_states"])
    assert whole.fingerprint != single.fingerprint != other.fingerprint


def test_several_pictures_a_prompt() -> None:
    pipeline, kwargs = qwen()
    calls = record(pipeline, ["a", "b", "c"], num_inference_steps=1, num_images_per_prompt=2, **kwargs)
    noise_of = calls[0].kwargs["hidden_states"]
    assert calls[0].batch == 6 and len({tuple(row.flatten().tolist()) for row in noise_of}) == 6


def test_several_videos_a_prompt() -> None:
    pipeline = WanPipeline(None, None, small_wan_vae(), FlowMatchEulerDiscreteScheduler(), small_wan())
    options = {"num_videos_per_prompt": 2, "num_inference_steps": 1, "guidance_scale": 1.0, "batch_size": 1}
    size = {"height": 16, "width": 16, "num_frames": 5, "output_type": "latent"}
    calls = record(pipeline, ["a", "b"], prompt_embeds=noise(2, 6, 16), **options, **size)
    assert [call.batch for call in calls] == [2, 2]
    videos = torch.cat([call.kwargs["hidden_states"] for call in calls])
    assert len({tuple(row.flatten().tolist()) for row in videos}) == 4
    given = record(pipeline, ["a", "b"], prompt_embeds=noise(2, 6, 16), latents=videos, **options, **size)
    for call, again in zip(calls, given, strict=True):
        assert torch.equal(call.kwargs["hidden_states"], again.kwargs["hidden_states"])


@pytest.mark.parametrize("prompts", [1, 2, 3])
def test_reference_pictures_belong_to_each_prompt(prompts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pictures are encoded at a megapixel otherwise, which takes seconds.
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 64 * 64)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", 64 * 64)
    pipeline = QwenImageEditPlusPipeline(
        FlowMatchEulerDiscreteScheduler(), small_qwen_vae(), None, None, None, small_qwen()
    )
    texts = [str(i) for i in range(prompts)]
    kwargs = {
        "prompt_embeds": noise(prompts, 6, 12),
        "prompt_embeds_mask": torch.ones(prompts, 6, dtype=torch.long),
        "image": [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")],
        "height": 64,
        "width": 64,
        "true_cfg_scale": 1.0,
    }
    calls = record(pipeline, texts, batch_size=1, num_inference_steps=1, **kwargs)
    assert len(calls) == prompts
    assert [len(call.kwargs["img_shapes"][0]) for call in calls] == [3] * prompts
    one = {name: kwargs[name][:1] for name in ("prompt_embeds", "prompt_embeds_mask")}
    alone = record(pipeline, texts[:1], num_inference_steps=1, **{**kwargs, **one})
    assert torch.equal(alone[0].kwargs["hidden_states"], calls[0].kwargs["hidden_states"])


class Painter:
    """A pipeline of one's own: one generator, pictures by name, a list of times as long as anything else."""

    def __init__(self) -> None:
        self.transformer = Positional()
        self.seen: list[dict[str, Any]] = []

    def __call__(
        self,
        prompt: list[str],
        image: Any = None,
        latents: Any = None,
        times: Any = (0.5,),
        generator: torch.Generator | None = None,
    ) -> Any:
        self.seen.append({"prompt": prompt, "image": image, "times": times})
        sample = torch.randn(len(prompt), 3, generator=generator) if latents is None else latents
        return self.transformer(list(sample), times[0], None)


def test_a_pipeline_that_takes_one_generator_draws_one_prompt_a_run() -> None:
    pipeline = Painter()
    calls = record(pipeline, ["a", "b", "c"])
    assert [call.prompts for call in calls] == [("a",), ("b",), ("c",)]
    alone = record(pipeline, ["a"])
    assert torch.equal(alone[0].kwargs["sample"][0], calls[0].kwargs["sample"][0])
    assert not torch.equal(calls[1].kwargs["sample"][0], calls[0].kwargs["sample"][0])


def test_arguments_are_divided_by_their_names_and_never_by_their_lengths() -> None:
    pipeline = Painter()
    rows = noise(2, 3)
    calls = record(pipeline, ["a", "b"], latents=rows, times=[0.5, 0.25], image=["x", "y"], batch_size=1)
    assert [call.kwargs["sample"][0].tolist() for call in calls] == rows.tolist()
    assert [seen["times"] for seen in pipeline.seen] == [[0.5, 0.25]] * 2
    assert [seen["image"] for seen in pipeline.seen] == [["x", "y"]] * 2
    pipeline.seen.clear()
    record(pipeline, ["a", "b"], image=["x", "y"], per_prompt=["image"], batch_size=1)
    assert [seen["image"] for seen in pipeline.seen] == [["x"], ["y"]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"latents": noise(3, 3)}, "'latents' has 3 rows and 2 prompts need 2"),
        ({"per_prompt": ["image"], "image": ["x"]}, "'image' has 1 items and 2 prompts need 2"),
        ({"per_prompt": ["image"], "image": "x"}, "per_prompt names 'image', a str; give a list or a tensor"),
        ({"per_prompt": ["imag"], "image": ["x", "y"]}, "'imag', which is not.*did you mean 'image'"),
        ({"generator": torch.Generator()}, "one generator for several prompts.*give seed="),
    ],
)
def test_arguments_that_cannot_be_divided(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(PpclError, match=reason):
        record(Painter(), ["a", "b"], **change)


def test_a_pipeline_without_a_prompt() -> None:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8
    ).eval()
    pipeline = DiTPipeline(transformer, small_vae(), DDIMScheduler())
    named = record(pipeline, ["shark", "umbrella"], class_labels=[2, 115], batch_size=1, num_inference_steps=1)
    assert [call.kwargs["class_labels"].tolist() for call in named] == [[2, 1000], [115, 1000]]
    numbers = record(pipeline, ["2", "115"], batch_size=1, num_inference_steps=1)
    assert numbers[1].prompts == ("115",)
    for one, other in zip(named, numbers, strict=True):
        assert torch.equal(one.kwargs["hidden_states"], other.kwargs["hidden_states"])
        assert torch.equal(one.kwargs["class_labels"], other.kwargs["class_labels"])
    with pytest.raises(PpclError, match="DiTPipeline takes no prompt, and 'shark' is no number.*class_labels="):
        record(pipeline, ["shark"], num_inference_steps=1)


def test_progress_counts_to_the_end() -> None:
    told: list[tuple[int, int]] = []
    record(shapes(), WORDS[:3], batch_size=2, num_inference_steps=3, progress=lambda *p: told.append(p))
    assert told == [*((i, 6) for i in range(6)), (6, 6)]


def test_the_pipeline_is_left_as_it_was() -> None:
    pipeline = shapes()
    before = fingerprint(pipeline.transformer)
    record(pipeline, WORDS[0], num_inference_steps=1)
    assert not hasattr(pipeline, "_progress_bar_config")
    pipeline.set_progress_bar_config(leave=False)

    def broken(module: Any, args: Any) -> None:
        raise RuntimeError("the model broke")

    handle = pipeline.transformer.transformer_blocks[1].register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="the model broke"):
        record(pipeline, WORDS[0], num_inference_steps=1)
    handle.remove()
    assert not pipeline.transformer._forward_pre_hooks
    assert not pipeline.transformer._forward_pre_hooks_with_kwargs
    assert pipeline._progress_bar_config == {"leave": False}
    assert fingerprint(pipeline.transformer) == before


def test_calls_made_in_inference_mode_can_be_trained_on() -> None:
    with torch.inference_mode():
        calls = record(shapes(), WORDS[0], num_inference_steps=1)
    tensors = [v for v in calls[0].kwargs.values() if isinstance(v, torch.Tensor)]
    assert tensors and not any(t.is_inference() or t.requires_grad for t in tensors)


class Positional(torch.nn.Module):
    """A transformer with a default, a positional argument and a dict."""

    def forward(self, sample: list[torch.Tensor], t: float, extra: Any = None, scale: float = 1.0) -> Any:
        return [x * scale + t for x in sample]


class PositionalPipeline:
    """A pipeline that is not of diffusers, and calls its transformer by position."""

    def __init__(self, extra: Any = None) -> None:
        self.transformer = Positional()
        self.extra = extra

    def __call__(self, prompt: list[str], start: float = 1.0, **rest: Any) -> Any:
        sample = [torch.full((3, i + 1), start) for i in range(len(prompt))]
        for t in (0.5, 0.25):
            sample = self.transformer(sample, t, self.extra, scale=2.0)
        return sample


def test_positional_arguments_get_their_names() -> None:
    extra = {"masks": (torch.ones(2), None), "mode": "a"}
    calls = record(PositionalPipeline(extra), ["a", "b"])
    assert [call.timestep for call in calls] == [0.5, 0.25] and calls[0].batch == 2
    assert set(calls[0].kwargs) == {"sample", "t", "extra", "scale"}
    assert (
        isinstance(calls[0].kwargs["extra"]["masks"], tuple) and calls[0].kwargs["extra"]["masks"][1] is None
    )
    assert set(record(PositionalPipeline(), ["a"])[0].kwargs) == {"sample", "t", "scale"}


def test_nan_is_found_while_recording() -> None:
    pipeline = PositionalPipeline()
    with pytest.raises(PpclError, match=r"call 0 \('a'\): 'sample\.0' holds NaN") as caught:
        record(pipeline, ["a"], start=float("nan"))
    assert "\n" not in str(caught.value) and not pipeline.transformer._forward_pre_hooks


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompts": []}, "there are no prompts"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"guidence_scale": 2.0}, "takes no argument 'guidence_scale'.*did you mean 'guidance_scale'"),
        ({"prompt": "x"}, "given twice"),
        ({"prompts": ["zzz"]}, "zzz"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
    ],
)
def test_what_the_user_got_wrong(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(PpclError, match=reason):
        record(shapes(), **{"prompts": [WORDS[0]], "num_inference_steps": 1, **change})


def test_a_pipeline_that_refuses_its_arguments() -> None:
    pipeline, kwargs = sd3()
    del kwargs["pooled_prompt_embeds"]
    with pytest.raises(
        PpclError, match="StableDiffusion3Pipeline refuses its arguments: .*pooled_prompt_embeds"
    ):
        record(pipeline, ["a", "b", "c"], num_inference_steps=1, **kwargs)


def test_what_cannot_be_recorded() -> None:
    with pytest.raises(PpclError, match="object has no transformer"):
        record(object(), ["a"])
    with pytest.raises(PpclError, match=r"argument 'extra' is a Generator"):
        record(PositionalPipeline(torch.Generator()), ["a"])
    silent = PositionalPipeline()
    silent.__class__ = type("Silent", (PositionalPipeline,), {"__call__": lambda self, prompt: prompt})
    with pytest.raises(PpclError, match="Silent did not call its transformer"):
        record(silent, ["a"])


def test_outputs_are_kept_and_are_the_transformers(tmp_path: Path) -> None:
    pipeline = shapes()
    calls = record(pipeline, [WORDS[0], WORDS[1]], num_inference_steps=2)
    for call in calls:
        with torch.no_grad():
            expected = pipeline.transformer(**call.kwargs)[0]
        assert call.output is not None
        assert torch.equal(call.output, expected)
        assert not call.output.requires_grad
    calls.save(tmp_path / "calls")
    for call, again in zip(calls, Calls.open(tmp_path / "calls"), strict=True):
        assert again.output is not None
        assert call.output is not None
        assert torch.equal(again.output, call.output)
    assert Calls.open(tmp_path / "calls").fingerprint == calls.fingerprint


def test_outputs_can_be_left_out_and_large_ones_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def outputs(**options: Any) -> list[bool]:
        calls = record(shapes(), [WORDS[0]], num_inference_steps=2, guidance_scale=1.0, **options)
        return [call.output is not None for call in calls]

    assert outputs() == [True, True]
    assert outputs(outputs=False) == [False, False]
    # Room for one of the two: all or none.
    monkeypatch.setattr(recording, "OUTPUT_BYTES", 4 * 24 * 24 * 3 + 1)
    assert outputs() == [False, False]
    assert outputs(outputs=True) == [True, True]
