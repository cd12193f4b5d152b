"""Pictures with captions as data: encoded once by the pipeline itself, noised anew at each load, to the bit."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ppcl_fx.calls.record import record
from ppcl_fx.errors import PpclError
from ppcl_fx.shapes.pipeline import ShapesPipeline, pack
from ppcl_fx.train.data import cache as caching
from ppcl_fx.train.data.cache import cut
from ppcl_fx.train.data.source import DataSource
from ppcl_fx.train.data.template import Template
from ppcl_fx.train.images.captions import open_pairs
from ppcl_fx.train.images.encode import Encoder
from ppcl_fx.train.images.flow import Density, generator_of
from ppcl_fx.train.images.images import ImageSource, open_images
from tests.train.sources.pictures import CAPTIONS, picture, png, same, write_folder

FEW, BATCH = 12, 3
MANY = 101


@pytest.fixture(scope="module")
def few(pipeline: ShapesPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set with its cache beside it."""
    root = tmp_path_factory.mktemp("few")
    write_folder(root / "data", FEW)
    open_images(Encoder(pipeline), root / "data", root / "cache", 1, 0)
    return root


def few_source(pipeline: Any, root: Path, **how: Any) -> ImageSource:
    return open_images(Encoder(pipeline), root / "data", root / "cache", BATCH, 0, **how)


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
    assert isinstance(source, DataSource)
    got, (epoch, indices) = source.kwargs(0), source.place(0)
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


def test_it_goes_on_from_a_state(pipeline: Any, few: Path) -> None:
    one, later = few_source(pipeline, few), few_source(pipeline, few)
    later.restore(one.state(6))
    assert same(later.kwargs(6), one.kwargs(6))
    assert later.fingerprint == one.fingerprint
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
    before = open_images(Encoder(pipeline), folder, tmp_path / "cache", 6, 0)
    assert encoded == CAPTIONS * 2
    encoded.clear()
    (folder / "3.png").write_bytes(png(picture(99)))
    after = open_images(Encoder(pipeline), folder, tmp_path / "cache", 6, 0)
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
    again = open_images(Encoder(pipeline), folder, tmp_path / "cache", 6, 0)
    assert encoded == CAPTIONS[:2]
    assert same(again.kwargs(0), after.kwargs(0))
    # Another pipeline has a cache of its own.
    other = ShapesPipeline(
        pipeline.transformer, FlowMatchEulerDiscreteScheduler(shift=2.0), pipeline.text_encoder
    )
    open_images(Encoder(other), folder, tmp_path / "cache", 6, 0)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_shards_are_encoded_like_the_folder(pipeline: Any, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", 3)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i in range(3):
            for kind, data in (("png", (folder / f"{i}.png").read_bytes()), ("txt", CAPTIONS[i].encode())):
                info = tarfile.TarInfo(f"{i}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    sources = [open_images(Encoder(pipeline), path, tmp_path / "cache", 3, 0) for path in (folder, tmp_path / "0.tar")]
    assert same(sources[0].kwargs(0), sources[1].kwargs(0))
    assert sources[0].fingerprint == sources[1].fingerprint


def test_one_corrupt_picture_in_a_hundred_is_skipped_and_two_stop(
    pipeline: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_folder(tmp_path / "data", MANY)
    (folder / "7.png").write_bytes((folder / "7.png").read_bytes()[:200])
    source = open_images(Encoder(pipeline), folder, tmp_path / "cache", 10, 0)
    name = "metadata.jsonl line 8 (7.png)"
    assert list(source.skips.reasons) == [name]
    assert f"{name} is skipped (no picture that can be read" in caplog.text
    assert sum(len(source.kwargs(step)["timestep"]) for step in range(10)) == 100
    # Skipped samples are remembered with the cache.
    assert list(open_images(Encoder(pipeline), folder, tmp_path / "cache", 10, 0).skips.reasons) == [name]
    lines = (folder / "metadata.jsonl").read_text().replace(CAPTIONS[1], "a purple elephant", 1)
    (folder / "metadata.jsonl").write_text(lines)
    with pytest.raises(PpclError, match="2 of 101 samples are corrupt, which is more than 1 %") as caught:
        open_images(Encoder(pipeline), folder, tmp_path / "cache", 10, 0)
    assert "\n" not in str(caught.value)


def test_a_damaged_sample_of_the_cache_is_skipped(pipeline: Any, tmp_path: Path) -> None:
    source = few_source(pipeline, _copy(pipeline, tmp_path))
    (tensors,) = tmp_path.glob("cache/*/*/calls/calls-00000.safetensors")
    data = bytearray(tensors.read_bytes())
    data[-3] ^= 255  # in the last tensor, which is one picture's
    tensors.write_bytes(data)
    damaged = few_source(pipeline, tmp_path)
    with pytest.raises(
        PpclError, match="1 of 3 samples are corrupt.*not what was encoded; remove that folder"
    ):
        damaged.kwargs(0)
    assert source.fingerprint == damaged.fingerprint


def _copy(pipeline: Any, root: Path) -> Path:
    write_folder(root / "data", 3)
    open_images(Encoder(pipeline), root / "data", root / "cache", 1, 0)
    return root


# ---- stock pipelines -------------------------------------------------------------------------------------------
