"""Checker: right pictures pass, wrong ones fail."""

from __future__ import annotations

import random

import pytest
import torch

from ppcl_fx.errors import PpclError
from ppcl_fx.shapes.captions import CATEGORIES, parse, prompts
from ppcl_fx.shapes.checker import check, find_objects
from ppcl_fx.shapes.drawing import BACKGROUND, draw_prompts

COUNT = 200


def _draw(text: str, seed: int = 0) -> torch.Tensor:
    return draw_prompts([parse(text)], random.Random(seed))[0]


@pytest.mark.parametrize("category", CATEGORIES)
def test_drawn_pictures_pass(category: str) -> None:
    wanted = prompts(category, COUNT, 5)
    pictures = draw_prompts(wanted, random.Random(category))
    passed = sum(check(picture, prompt) for picture, prompt in zip(pictures, wanted, strict=True))
    assert passed >= 0.98 * COUNT


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ("a circle", "a square"),
        ("a circle", "two circles"),
        ("a circle", "a circle and a square"),
        ("a circle and a square", "a circle and a triangle"),
        ("a circle and a square", "a circle"),
        ("three squares", "two squares"),
        ("three squares", "four squares"),
        ("three squares", "three triangles"),
        ("a red circle", "a blue circle"),
        ("a yellow circle", "a yellow square"),
        ("a circle left of a square", "a circle right of a square"),
        ("a circle left of a square", "a circle above a square"),
        ("a circle above a square", "a square above a circle"),
        ("a red circle and a blue square", "a blue circle and a red square"),
        ("a red circle and a blue square", "a red square and a blue circle"),
        ("a red circle and a blue square", "a red circle"),
    ],
)
def test_other_prompts_pictures_fail(asked: str, shown: str) -> None:
    for seed in range(5):
        picture = _draw(shown, seed)
        assert check(picture, parse(shown)) == 1
        assert check(picture, parse(asked)) == 0


@pytest.mark.parametrize("category", CATEGORIES)
def test_blank_and_noise_fail(category: str) -> None:
    blank = torch.tensor(BACKGROUND)[:, None, None].expand(3, 24, 24)
    noise = torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    for prompt in prompts(category, 6, 0):
        assert [check(picture, prompt) for picture in (blank, noise, -blank, blank * 0)] == [0] * 4


def test_an_extra_blob_makes_a_picture_wrong() -> None:
    picture = _draw("a red circle")
    found = find_objects(picture)[0]
    row, column = (0 if middle > 11 else 20 for middle in (found.y, found.x))
    picture[:, row : row + 3, column : column + 3] = torch.tensor([0.9, 0.7, -0.7])[:, None, None]
    assert len(find_objects(picture)) == 2
    assert check(picture, parse("a red circle")) == 0


def test_half_an_object_is_unknown() -> None:
    picture = _draw("a red square")
    left = round(find_objects(picture)[0].x)
    picture[:, :, left:] = torch.tensor(BACKGROUND)[:, None, None]
    assert [item.shape for item in find_objects(picture)] == [None]


def test_an_odd_colour_is_unknown() -> None:
    picture = _draw("a red square")
    picture = picture[[0, 1, 0]]
    assert [item.colour for item in find_objects(picture)] == [None]


def test_some_noise_is_forgiven_and_the_picture_left_alone() -> None:
    picture = _draw("a blue triangle and a red circle") + 0.05 * torch.randn(
        3, 24, 24, generator=torch.Generator().manual_seed(1)
    )
    before = picture.clone()
    assert check(picture, parse("a blue triangle and a red circle")) == 1
    assert torch.equal(picture, before)


def test_a_picture_of_another_size_is_refused() -> None:
    with pytest.raises(PpclError, match="24, 24"):
        check(torch.zeros(3, 32, 32), parse("a circle"))
