"""Score a pipeline: draw pictures for fixed prompts and count those that show what was asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ppcl_fx.errors import PpclError
from ppcl_fx.shapes.captions import CATEGORIES, Prompt, parse, prompts
from ppcl_fx.shapes.checker import check
from ppcl_fx.shapes.pipeline import GUIDANCE, STEPS

BATCH = 64  # pictures drawn at once


@dataclass(frozen=True)
class Drawn:
    """One scored picture: its prompt, its pixels (3, 24, 24) in [-1, 1], and its score, 1 or 0."""

    prompt: Prompt
    picture: torch.Tensor
    score: int


def generate(
    pipeline: Callable[..., object],
    wanted: list[Prompt],
    seed: int = 0,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch: int = BATCH,
) -> torch.Tensor:
    """Draw one picture for each prompt, each from its own seeded noise: the batch size does not change it.

    Pictures are of shape (len(wanted), 3, 24, 24) in [-1, 1], float32.
    """
    parts = [torch.zeros(0, 3, 24, 24)]
    for start in range(0, len(wanted), batch):
        group = wanted[start : start + batch]
        sources = [torch.Generator().manual_seed(seed * 1_000_003 + start + i) for i in range(len(group))]
        images = pipeline(
            [prompt.text for prompt in group],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=sources,
            output_type="pt",
            return_dict=False,
        )
        assert isinstance(images, tuple)
        parts.append(images[0].float().cpu() * 2 - 1)
    return torch.cat(parts)


def score_pictures(
    pipeline: Callable[..., object], per_category: int = 64, seed: int = 0, batch: int = BATCH, **how: Any
) -> list[Drawn]:
    """Draw and check ``per_category`` pictures in each of the six categories, ``batch`` at once.

    The pipeline is a ``ShapesPipeline``, or a callable with the same arguments. ``seed`` fixes the order of the
    prompts and all noise; ``how`` are ``steps`` and ``guidance``, as for `generate`. Raises PpclError where a number
    is below 1.
    """
    if per_category < 1 or batch < 1:
        raise PpclError(f"per_category is {per_category} and batch is {batch}; both must be 1 or more")
    wanted = [prompt for category in CATEGORIES for prompt in prompts(category, per_category, seed)]
    pictures = generate(pipeline, wanted, seed, batch=batch, **how)
    return [Drawn(asked, picture, check(picture, asked)) for asked, picture in zip(wanted, pictures, strict=True)]


def share_right(pictures: torch.Tensor, texts: Sequence[str]) -> float:
    """Return the share of pictures that show what their captions ask.

    Pictures are of shape (batch, 3, 24, 24) in [0, 1], as the pipeline gives them with ``output_type="pt"``; there is
    a caption for each, or for each of several in a row. Raises PpclError where it is none of
    ``ppcl_fx.shapes.captions``.
    """
    times = len(pictures) // max(1, len(texts))
    wanted = [parse(text) for text in texts for _ in range(times)]
    right = [check(picture.float() * 2 - 1, prompt) for picture, prompt in zip(pictures, wanted, strict=True)]
    return sum(right) / len(right)


def summarise(drawn: list[Drawn]) -> dict[str, float]:
    """Return the mean score of each category, and under "overall" the mean of those means."""
    means = {}
    for category in CATEGORIES:
        scores = [item.score for item in drawn if item.prompt.category == category]
        if scores:
            means[category] = sum(scores) / len(scores)
    means["overall"] = sum(means.values()) / max(1, len(means))
    return means


def score(pipeline: Callable[..., object], per_category: int = 64, seed: int = 0, **how: Any) -> dict[str, float]:
    """Return the share of right pictures in each category, and "overall", their mean; see `score_pictures`."""
    return summarise(score_pictures(pipeline, per_category, seed, **how))
