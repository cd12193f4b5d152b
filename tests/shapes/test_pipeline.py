"""Pipeline: words in, pictures out; it saves, loads, and takes another transformer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from ppcl_fx.errors import PpclError
from ppcl_fx.shapes.captions import CATEGORIES, prompts
from ppcl_fx.shapes.course import empty_transformer
from ppcl_fx.shapes.pipeline import ShapesPipeline, pack, unpack
from ppcl_fx.shapes.score import generate, score, score_pictures, summarise
from ppcl_fx.shapes.words import WordEncoder


@pytest.fixture
def pipeline() -> ShapesPipeline:
    """A pipeline with one random block."""
    torch.manual_seed(0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    made = ShapesPipeline(empty_transformer(1).eval(), scheduler, WordEncoder())
    made.set_progress_bar_config(disable=True)
    return made


class Recorder(nn.Module):
    """A stand-in transformer that notes how it is called and answers with zeros."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.dtype = config, torch.float32
        self.calls: list[dict[str, Any]] = []

    def forward(self, **kwargs: Any) -> tuple[torch.Tensor]:
        """Note the arguments."""
        self.calls.append(kwargs)
        return (torch.zeros_like(kwargs["hidden_states"]),)


def _draw(pipeline: ShapesPipeline, seed: int = 0, **kwargs: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    picture: torch.Tensor = pipeline(
        "a circle", num_inference_steps=2, generator=generator, output_type="pt", **kwargs
    ).images
    return picture


def test_packing_keeps_patches_together() -> None:
    picture = torch.arange(2 * 3 * 24 * 24.0).reshape(2, 3, 24, 24)
    tokens = pack(picture)
    assert tokens.shape == (2, 64, 27)
    assert torch.equal(tokens[1, 9].reshape(3, 3, 3), picture[1, :, 3:6, 3:6])
    assert torch.equal(unpack(tokens), picture)


def test_output_types(pipeline: ShapesPipeline) -> None:
    assert _draw(pipeline).shape == (1, 3, 24, 24)
    arguments: dict[str, Any] = {"num_inference_steps": 1, "return_dict": False}
    assert pipeline(["a circle"] * 2, output_type="np", **arguments)[0].shape == (2, 24, 24, 3)
    assert pipeline("a circle", **arguments)[0][0].size == (24, 24)


def test_the_same_seed_gives_the_same_picture(pipeline: ShapesPipeline) -> None:
    assert torch.equal(_draw(pipeline), _draw(pipeline))
    assert not torch.equal(_draw(pipeline), _draw(pipeline, seed=1))


def test_the_transformer_is_called_by_keyword_with_and_without_caption(pipeline: ShapesPipeline) -> None:
    recorder = Recorder(pipeline.transformer.config)
    pipeline.transformer = recorder
    _draw(pipeline, guidance_scale=3.0)
    assert len(recorder.calls) == 4
    first, second = recorder.calls[:2]
    assert set(first) == {"hidden_states", "encoder_hidden_states", "timestep", "img_shapes", "return_dict"}
    assert torch.equal(first["encoder_hidden_states"], pipeline.text_encoder.encode(["a circle"]))
    assert torch.equal(second["encoder_hidden_states"], pipeline.text_encoder.encode([""]))
    assert float(first["timestep"]) == 1.0 and first["img_shapes"] == [[(1, 8, 8)]]
    _draw(pipeline, guidance_scale=1.0)
    assert len(recorder.calls) == 6


def test_it_saves_and_loads_as_safetensors_only(pipeline: ShapesPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "ShapesPipeline"
    loaded = ShapesPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(_draw(loaded), _draw(pipeline))


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ({"prompt": []}, "empty"),
        ({"prompt": "a dog"}, "dog"),
        ({"prompt": "a circle", "num_inference_steps": 0}, "1 or more"),
        ({"prompt": "a circle", "output_type": "gif"}, "'pil'"),
        ({"prompt": "a circle", "generator": [torch.Generator()] * 2}, "one for each"),
    ],
)
def test_bad_arguments_are_refused(pipeline: ShapesPipeline, arguments: dict[str, Any], hint: str) -> None:
    with pytest.raises(PpclError, match=hint):
        pipeline(**arguments)


def test_word_vectors_are_frozen_and_repeat() -> None:
    first, second = WordEncoder(), WordEncoder()
    assert torch.equal(first.table, second.table)
    assert not any(weight.requires_grad for weight in first.parameters())
    vectors = first.encode(["a circle", ""])
    assert vectors.shape == (2, 10, 64)
    assert torch.equal(vectors[1], first.table[0].expand(10, 64))


def test_the_batch_size_does_not_change_the_noise(pipeline: ShapesPipeline) -> None:
    wanted = prompts("colors", 5, 0)
    whole, split = (generate(pipeline, wanted, seed=3, steps=1, batch=batch) for batch in (5, 2))
    assert torch.allclose(whole, split, atol=1e-4)


def test_scoring_counts_each_category(pipeline: ShapesPipeline) -> None:
    means = score(pipeline, per_category=2, steps=1)
    assert list(means) == [*CATEGORIES, "overall"]
    assert means["overall"] == 0.0
    drawn = score_pictures(pipeline, per_category=2, steps=1)
    assert len(drawn) == 12 and summarise(drawn) == means


def test_scoring_nothing_is_refused(pipeline: ShapesPipeline) -> None:
    with pytest.raises(PpclError, match="1 or more"):
        score(pipeline, per_category=0)
