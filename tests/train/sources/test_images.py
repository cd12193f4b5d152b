"""Pictures with captions as data: encoded once by the pipeline itself, noised anew at each load, to the bit."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler
from PIL import Image

from ppcl_fx.errors import PpclError
from ppcl_fx.recording import first_call, record
from ppcl_fx.shapes.pipeline import ShapesPipeline, pack
from ppcl_fx.train.sources import cache as caching
from ppcl_fx.train.sources.cache import cut, encode
from ppcl_fx.train.sources.encode import Encoder
from ppcl_fx.train.sources.flow import Density, generator_of
from ppcl_fx.train.sources.images import ImageSource, open_images
from ppcl_fx.train.sources.pairs import open_pairs
from ppcl_fx.train.sources.source import Source
from ppcl_fx.train.sources.template import Template, Unsupported, find_template
from tests import test_recording as pipelines
from tests.shapes_folder import save_pipeline

CAPTIONS = ["a red circle", "a blue square", "two red circles"]
FEW, BATCH = 12, 3
MANY = 101


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> ShapesPipeline:
    """A small random pipeline in pixel space, whose scheduler shifts by 3."""
    folder = save_pipeline(tmp_path_factory.mktemp("pipeline"), blocks=1)
    loaded: ShapesPipeline = ShapesPipeline.from_pretrained(folder)
    return loaded


def picture(seed: int, height: int = 24, width: int = 24) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_folder(folder: Path, count: int, height: int = 24, width: int = 24) -> Path:
    folder.mkdir()
    lines = []
    for i in range(count):
        (folder / f"{i}.png").write_bytes(png(picture(i, height, width)))
        lines.append(json.dumps({"file_name": f"{i}.png", "text": CAPTIONS[i % 3]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def few(pipeline: ShapesPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set with its cache beside it."""
    root = tmp_path_factory.mktemp("few")
    write_folder(root / "data", FEW)
    open_images(pipeline, root / "data", root / "cache", 1, 0)
    return root


def few_source(pipeline: Any, root: Path, **how: Any) -> ImageSource:
    return open_images(pipeline, root / "data", root / "cache", BATCH, 0, **how)


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        for name, value in first.items()
    )


def test_the_template_of_the_shapes_pipeline(pipeline: Any, few: Path) -> None:
    (folder,) = (few / "cache").iterdir()
    template = Template.model_validate_json((folder / "template.json").read_text())
    assert template == Template(
        noisy=("hidden_states",),
        repeats=1,
        time="timestep",
        scale=1.0,
        inverted=False,
        shift="static",
        amount=3.0,
        noise=(1, 3, 24, 24),
    )


def test_a_sample_is_the_picture_at_its_noise_level(pipeline: Any, few: Path) -> None:
    source = few_source(pipeline, few)
    assert isinstance(source, Source)
    got, (epoch, indices) = source.kwargs(0), source._order.place(0)
    reference = record(pipeline, CAPTIONS, num_inference_steps=1, guidance_scale=1.0)[0].kwargs
    assert got.keys() == reference.keys()
    assert got["img_shapes"] == reference["img_shapes"][:1] * BATCH
    for row, index in enumerate(indices):
        generator = generator_of(0, epoch, index)
        u = Density().draw(generator)
        sigma = 3 * u / (1 + 2 * u)
        clean = pack(torch.from_numpy(picture(index)).permute(2, 0, 1)[None].float() / 127.5 - 1)
        noise = torch.randn(1, 64, 27, generator=generator)
        assert torch.equal(got["hidden_states"][row : row + 1], (1 - sigma) * clean + sigma * noise)
        assert float(got["timestep"][row]) == pytest.approx(sigma, abs=1e-7)
        words = reference["encoder_hidden_states"][index % 3]
        assert torch.equal(got["encoder_hidden_states"][row], words)


def test_a_killed_run_goes_on_to_the_bit_and_encodes_nothing_again(
    pipeline: Any, few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = few_source(pipeline, few)
    expected = [whole.kwargs(step) for step in range(9)]

    def never(*args: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(Encoder, "encode", never)
    for step in (8, 4, 0):
        assert same(few_source(pipeline, few).kwargs(step), expected[step])
    # The next epoch has the same pictures at other levels.
    assert len(whole) == 4
    assert sum(len(k["timestep"]) for k in expected[:4]) == FEW
    assert not {float(t) for k in expected[:4] for t in k["timestep"]} & {
        float(t) for k in expected[4:8] for t in k["timestep"]
    }


def test_ranks_get_what_one_process_gets(pipeline: Any, few: Path) -> None:
    one = few_source(pipeline, few)
    ranks = [few_source(pipeline, few, rank=rank, world=3) for rank in range(3)]
    assert all(same(ranks[n % 3].kwargs(n // 3), one.kwargs(n)) for n in range(7))
    later = few_source(pipeline, few)
    later.restore(ranks[0].state(2))
    assert same(later.kwargs(2), one.kwargs(6))
    assert {s.fingerprint for s in ranks} == {one.fingerprint}
    assert few_source(pipeline, few, density=Density("uniform")).fingerprint != one.fingerprint


def test_a_changed_picture_is_encoded_again_and_no_other(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching, "PART", 2)
    folder = write_folder(tmp_path / "data", 6)
    encoded: list[str] = []
    original: Callable[..., Any] = Encoder.encode

    def counted(self: Encoder, data: bytes, caption: str) -> Any:
        encoded.append(caption)
        return original(self, data, caption)

    monkeypatch.setattr(Encoder, "encode", counted)
    before = open_images(pipeline, folder, tmp_path / "cache", 6, 0)
    assert encoded == CAPTIONS * 2
    encoded.clear()
    (folder / "3.png").write_bytes(png(picture(99)))
    after = open_images(pipeline, folder, tmp_path / "cache", 6, 0)
    assert encoded == [CAPTIONS[2], CAPTIONS[0]], "the part with the changed picture"
    rows = zip(before.kwargs(0)["hidden_states"], after.kwargs(0)["hidden_states"], strict=True)
    assert sum(not torch.equal(a, b) for a, b in rows) == 1
    # A part that a killed copy or a bad disk left behind is encoded again, with a warning.
    encoded.clear()
    (pipeline_folder,) = (tmp_path / "cache").iterdir()
    part = pipeline_folder / cut(open_pairs(folder))[0].name / "calls" / "calls-00000.safetensors"
    whole = part.read_bytes()
    part.unlink()  # the open sources keep theirs
    part.write_bytes(whole[:100])
    again = open_images(pipeline, folder, tmp_path / "cache", 6, 0)
    assert encoded == CAPTIONS[:2]
    assert same(again.kwargs(0), after.kwargs(0))
    # Another pipeline has a cache of its own.
    other = ShapesPipeline(pipeline.transformer, FlowMatchEulerDiscreteScheduler(shift=2.0), pipeline.text_encoder)
    open_images(other, folder, tmp_path / "cache", 6, 0)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_ranks_encode_their_own_parts(pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "PART", 2)
    folder = write_folder(tmp_path / "data", 6)
    parts = cut(open_pairs(folder))
    done: list[tuple[int, int]] = []
    for rank in range(2):
        with pytest.raises(PpclError, match="is not encoded; encode the pictures first"):
            caching.find_parts(tmp_path / "cache" / Encoder(pipeline).key[:32], parts)
        encode(Encoder(pipeline), parts, tmp_path / "cache", rank=rank, world=2, progress=lambda *d: done.append(d))
    assert done == [(2, 4), (4, 4), (2, 2)]
    assert len(open_images(pipeline, folder, tmp_path / "cache", 2, 0)) == 3


def test_shards_are_encoded_like_the_folder(pipeline: Any, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", 3)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i in range(3):
            for kind, data in (("png", (folder / f"{i}.png").read_bytes()), ("txt", CAPTIONS[i].encode())):
                info = tarfile.TarInfo(f"{i}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    sources = [open_images(pipeline, path, tmp_path / "cache", 3, 0) for path in (folder, tmp_path / "0.tar")]
    assert same(sources[0].kwargs(0), sources[1].kwargs(0))
    assert sources[0].fingerprint == sources[1].fingerprint


def test_one_corrupt_picture_in_a_hundred_is_skipped_and_two_stop(
    pipeline: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_folder(tmp_path / "data", MANY)
    (folder / "7.png").write_bytes((folder / "7.png").read_bytes()[:200])
    source = open_images(pipeline, folder, tmp_path / "cache", 10, 0)
    name = "metadata.jsonl line 8 (7.png)"
    assert list(source.skips.reasons) == [name]
    assert f"{name} is skipped (no picture that can be read" in caplog.text
    assert sum(len(source.kwargs(step)["timestep"]) for step in range(10)) == 100
    # Skipped samples are remembered with the cache.
    assert list(open_images(pipeline, folder, tmp_path / "cache", 10, 0).skips.reasons) == [name]
    lines = (folder / "metadata.jsonl").read_text().replace(CAPTIONS[1], "a purple elephant", 1)
    (folder / "metadata.jsonl").write_text(lines)
    with pytest.raises(PpclError, match="2 of 101 samples are corrupt, which is more than 1 %") as caught:
        open_images(pipeline, folder, tmp_path / "cache", 10, 0)
    assert "\n" not in str(caught.value)


def test_a_damaged_sample_of_the_cache_is_skipped(pipeline: Any, tmp_path: Path) -> None:
    source = few_source(pipeline, _copy(pipeline, tmp_path))
    (tensors,) = tmp_path.glob("cache/*/*/calls/calls-00000.safetensors")
    data = bytearray(tensors.read_bytes())
    data[-3] ^= 255  # in the last tensor, which is one picture's
    tensors.write_bytes(data)
    damaged = few_source(pipeline, tmp_path)
    with pytest.raises(PpclError, match="1 of 3 samples are corrupt.*not what was encoded; remove that folder"):
        damaged.kwargs(0)
    assert source.fingerprint == damaged.fingerprint


def _copy(pipeline: Any, root: Path) -> Path:
    write_folder(root / "data", 3)
    open_images(pipeline, root / "data", root / "cache", 1, 0)
    return root


# ---- stock pipelines -------------------------------------------------------------------------------------------


def with_vae(build: Callable[[], tuple[Any, dict[str, Any]]], vae: Any, **config: Any) -> tuple[Any, dict[str, Any]]:
    """A small stock pipeline with a VAE; the text comes as embeddings, for want of a tokenizer."""
    made, kwargs = build()
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    made = type(made)(**{**made.components, "vae": vae.eval(), "scheduler": scheduler})
    kept = {name: value[:1] for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
    return made, kept


def image_vae() -> AutoencoderKL:
    torch.manual_seed(1)
    sizes = {"block_out_channels": (4, 4, 4, 4), "latent_channels": 4, "norm_num_groups": 2, "sample_size": 32}
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
    source = open_images(pipe, folder, tmp_path / "cache", 2, 0, guidance_scale=2.5, **given)
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
    source = open_images(pipe, folder, tmp_path / "cache", 2, 0, height=32, width=48, **given)
    assert (source._template.repeats, source._template.scale) == (2, 1000.0)
    got = source.kwargs(0)["hidden_states"]
    assert got.shape == (4, 4, 4, 6)
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[2], got[3])
    assert not torch.equal(got[0], got[2])
    time = source.kwargs(0)["timestep"]
    assert 0 < time[0] == time[1] < 1000
    alone = open_images(pipe, folder, tmp_path / "cache", 2, 0, height=32, width=48, guidance_scale=1.0, **given)
    assert alone.kwargs(0)["hidden_states"].shape == (2, 4, 4, 6)


def test_qwen_image_with_a_vae_of_videos(tmp_path: Path) -> None:
    pipe, given = with_vae(pipelines.qwen, video_vae())
    given["prompt_embeds_mask"] = torch.ones(1, 5, dtype=torch.long)
    del given["negative_prompt_embeds"]
    folder = write_folder(tmp_path / "data", 2, 32, 48)
    source = open_images(pipe, folder, tmp_path / "cache", 2, 0, **given)
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
    stored = source._parts[0].calls()[0].kwargs["hidden_states"]
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
def test_pipelines_that_do_something_else_are_refused(pipeline: Any, tmp_path: Path, way: str, reason: str) -> None:
    odd = Odd(**pipeline.components)
    odd.way = way
    with pytest.raises(Unsupported, match="use --prompts or --calls with this pipeline") as caught:
        open_images(odd, write_folder(tmp_path / "data", 1), tmp_path / "cache", 1, 0)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_vae_whose_scale_is_not_the_pipeline_s_is_refused(tmp_path: Path) -> None:
    pipe, given = with_vae(pipelines.flux, image_vae())
    decode = pipe.vae.decode
    pipe.vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[2.0] * 4)  # the pipeline does not know of them
    with pytest.raises(Unsupported, match="it does not decode a latent to what its VAE encoded"):
        open_images(pipe, write_folder(tmp_path / "data", 1, 32, 32), tmp_path / "cache", 1, 0, **given)
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
