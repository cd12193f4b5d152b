"""Pictures go through VAEs of stock pipelines; pipelines that do something else are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler

from ppcl_fx.calls.record import first_call, record
from ppcl_fx.errors import PpclError
from ppcl_fx.shapes.pipeline import ShapesPipeline
from ppcl_fx.train.data.template import Unsupported, find_template
from ppcl_fx.train.images.encode import Encoder
from ppcl_fx.train.images.flow import generator_of
from ppcl_fx.train.images.images import open_images
from tests import test_recording as pipelines
from tests.train.sources.pictures import CAPTIONS, picture, same, write_folder


def with_vae(
    build: Callable[[], tuple[Any, dict[str, Any]]], vae: Any, **config: Any
) -> tuple[Any, dict[str, Any]]:
    """A small stock pipeline with a VAE; the text comes as embeddings, for want of a tokenizer."""
    made, kwargs = build()
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    made = type(made)(**{**made.components, "vae": vae.eval(), "scheduler": scheduler})
    kept = {name: value[:1] for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
    return made, kept


def image_vae() -> AutoencoderKL:
    torch.manual_seed(1)
    sizes = {
        "block_out_channels": (4, 4, 4, 4),
        "latent_channels": 4,
        "norm_num_groups": 2,
        "sample_size": 32,
    }
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    return AutoencoderKL(
        down_block_types=down, up_block_types=up, scaling_factor=1.5, shift_factor=0.2, **sizes
    )


def video_vae() -> AutoencoderKLQwenImage:
    torch.manual_seed(1)
    statistics = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
    return AutoencoderKLQwenImage(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **statistics)


def test_flux_with_a_shift_that_depends_on_the_size(tmp_path: Path) -> None:
    pipe, given = with_vae(pipelines.flux, image_vae(), use_dynamic_shifting=True)
    folder = write_folder(tmp_path / "data", 2, 48, 70)
    source = open_images(Encoder(pipe, arguments={"guidance_scale": 2.5, **given}), folder, tmp_path / "cache", 2, 0)
    template = source._template
    assert (template.noisy, template.scale, template.shift) == (("hidden_states",), 1.0, "exponential")
    got = source.kwargs(0)
    assert got["hidden_states"].shape == (2, 3 * 4, 16), "70 pixels are cut to 64"
    assert got["guidance"].tolist() == [2.5, 2.5]
    assert got["img_ids"].shape == (12, 3)
    # mu as the pipeline has it: the line from 0.5 at 256 tokens to 1.15 at 4096, at 12 tokens.
    mu = source._parts[0].card.mu
    assert mu == pytest.approx([0.5 + (12 - 256) * (1.15 - 0.5) / (4096 - 256)] * 2)
    with torch.no_grad():
        assert pipe.transformer(**got)[0].shape == got["hidden_states"].shape


def test_sd3_with_both_branches_of_guidance_in_one_call(tmp_path: Path) -> None:
    pipe, given = with_vae(pipelines.sd3, image_vae())
    folder = write_folder(tmp_path / "data", 2, 60, 90)
    source = open_images(Encoder(pipe, 32, 48, given), folder, tmp_path / "cache", 2, 0)
    assert (source._template.repeats, source._template.scale) == (2, 1000.0)
    got = source.kwargs(0)["hidden_states"]
    assert got.shape == (4, 4, 4, 6)
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[2], got[3])
    assert not torch.equal(got[0], got[2])
    time = source.kwargs(0)["timestep"]
    assert 0 < time[0] == time[1] < 1000
    alone = open_images(
        Encoder(pipe, 32, 48, {"guidance_scale": 1.0, **given}), folder, tmp_path / "cache", 2, 0
    )
    assert alone.kwargs(0)["hidden_states"].shape == (2, 4, 4, 6)


def test_qwen_image_with_a_vae_of_videos(tmp_path: Path) -> None:
    pipe, given = with_vae(pipelines.qwen, video_vae())
    given["prompt_embeds_mask"] = torch.ones(1, 5, dtype=torch.long)
    del given["negative_prompt_embeds"]
    folder = write_folder(tmp_path / "data", 2, 32, 48)
    source = open_images(Encoder(pipe, arguments=given), folder, tmp_path / "cache", 2, 0)
    assert source._template.noise == (1, 1, 4, 4, 6)
    got = source.kwargs(0)
    assert got["hidden_states"].shape == (2, 6, 16)
    assert got["img_shapes"] == [[(1, 2, 3)]] * 2
    # By hand: normalised by the VAE's statistics, in patches of two by two.
    pixels = torch.from_numpy(picture(0, 32, 48)).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
    with torch.no_grad():
        raw = pipe.vae.encode(pixels).latent_dist.mode()[:, :, 0]
    mean, std = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    clean = pipe._pack_latents((raw - mean.view(1, 4, 1, 1)) / std.view(1, 4, 1, 1), 1, 4, 4, 6)
    stored = source._calls(source._parts[0].folder)[0].kwargs["hidden_states"]
    torch.testing.assert_close(stored, clean, rtol=1e-6, atol=1e-6)


# ---- refusals --------------------------------------------------------------------------------------------------


class Odd(ShapesPipeline):
    """A pipeline that is not what training on pictures needs, in one of several ways."""

    way = ""

    def _velocity(self, tokens: torch.Tensor, words: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        changed = {
            "scaled": (tokens * 2, words, sigma),
            "moving words": (tokens, words * sigma, sigma),
            "crooked time": (tokens, words, sigma**2),
            "blind": (tokens * 0, words, sigma),
        }
        return super()._velocity(*changed[self.way])


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("scaled", "its noise does not come as it was drawn into hidden_states"),
        ("moving words", "'encoder_hidden_states' of its transformer changes from step to step"),
        ("crooked time", "do not follow from the noise levels"),
        ("blind", "no argument of its transformer follows the noise"),
    ],
)
def test_pipelines_that_do_something_else_are_refused(
    pipeline: Any, tmp_path: Path, way: str, reason: str
) -> None:
    odd = Odd(**pipeline.components)
    odd.way = way
    with pytest.raises(Unsupported, match="use --prompts or --calls with this pipeline") as caught:
        open_images(Encoder(odd), write_folder(tmp_path / "data", 1), tmp_path / "cache", 1, 0)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_vae_whose_scale_is_not_the_pipeline_s_is_refused(tmp_path: Path) -> None:
    pipe, given = with_vae(pipelines.flux, image_vae())
    decode = pipe.vae.decode
    pipe.vae.register_to_config(
        latents_mean=[0.0] * 4, latents_std=[2.0] * 4
    )  # the pipeline does not know of them
    encoder = Encoder(pipe, arguments=given)
    with pytest.raises(Unsupported, match="it does not decode a latent to what its VAE encoded"):
        open_images(encoder, write_folder(tmp_path / "data", 1, 32, 32), tmp_path / "cache", 1, 0)
    assert pipe.vae.decode == decode, "nothing is left on the pipeline"
    assert "set_timesteps" not in vars(pipe.scheduler)


def test_sizes_that_cannot_be_are_refused(pipeline: Any) -> None:
    with pytest.raises(PpclError, match="draws pictures of one size; leave out height and width"):
        Encoder(pipeline, 24, 24)
    flux, _ = with_vae(pipelines.flux, image_vae())
    with pytest.raises(PpclError, match="give both"):
        Encoder(flux, 32)
    with pytest.raises(PpclError, match="30x32: sides must be multiples of 16"):
        Encoder(flux, 32, 30)


def test_the_first_call_runs_no_transformer_and_is_the_recorded_one(pipeline: Any) -> None:
    ran: list[int] = []
    handle = pipeline.transformer.register_forward_hook(lambda *_: ran.append(1))
    call = first_call(pipeline, CAPTIONS[0], seed=5)
    handle.remove()
    assert not ran
    assert not pipeline.transformer._forward_pre_hooks
    assert same(call.kwargs, record(pipeline, CAPTIONS[0], num_inference_steps=1, seed=5)[0].kwargs)


def test_the_template_is_found_whatever_the_time_is_called(pipeline: Any) -> None:
    class Inverted(ShapesPipeline):
        def _velocity(self, tokens: torch.Tensor, words: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return super()._velocity(tokens, words, (1 - sigma) * 1000)

    template = find_template(Inverted(**pipeline.components), CAPTIONS[0])
    assert (template.scale, template.inverted) == (1000.0, True)
    kwargs = {"hidden_states": torch.zeros(1, 2), "timestep": torch.zeros(1)}
    assert template.at(kwargs, 0.25, generator_of(0))["timestep"].tolist() == [750.0]
