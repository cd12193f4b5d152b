"""Drawing: pictures have the size, the range and the objects that were asked for."""

from __future__ import annotations

import random

import torch

from ppcl_fx.shapes.captions import CATEGORIES, prompts
from ppcl_fx.shapes.drawing import BACKGROUND, OFFSETS, PALETTE, draw, draw_prompts, sprites


def _scene(shape: int, colour: int, cell: int, offset: tuple[int, int] = (3, 3)) -> torch.Tensor:
    shapes = torch.full((1, 9), -1)
    shapes[0, cell] = shape
    return draw(shapes, torch.full((1, 9), colour), torch.tensor(offset).expand(1, 9, 2))[0]


def test_sprites_are_shares_with_soft_edges() -> None:
    table = sprites()
    assert table.shape == (3, len(OFFSETS), len(OFFSETS), 8, 8)
    assert float(table.min()) >= 0 and float(table.max()) == 1
    circles = table[0]
    assert bool(((circles > 0) & (circles < 1)).any(dim=-1).any(dim=-1).all())


def test_every_sprite_stays_inside_its_cell() -> None:
    area = sprites().sum(dim=(-1, -2))
    assert bool((area.amax(dim=(1, 2)) - area.amin(dim=(1, 2)) < 0.3).all())


def test_an_object_lands_in_its_cell_with_its_colour() -> None:
    picture = _scene(1, 2, 5)
    assert torch.allclose(picture[:, 12, 20], torch.tensor(PALETTE[2]))
    outside = picture.clone()
    outside[:, 8:16, 16:24] = torch.tensor(BACKGROUND)[:, None, None]
    assert torch.allclose(outside, torch.tensor(BACKGROUND)[:, None, None].expand(3, 24, 24))


def test_offsets_move_an_object_down_and_right() -> None:
    cover = sprites()
    rows = torch.arange(8.0)
    for axis, low, high in ((-2, cover[1, 0, 3], cover[1, 6, 3]), (-1, cover[1, 3, 0], cover[1, 3, 6])):
        weight = rows[:, None] if axis == -2 else rows[None, :]
        moved = (high * weight).sum() / high.sum() - (low * weight).sum() / low.sum()
        assert abs(float(moved) - 1.5) < 0.05


def test_pictures_are_in_range_and_repeat_with_the_seed() -> None:
    for category in CATEGORIES:
        wanted = prompts(category, 8, 1)
        first, again = (draw_prompts(wanted, random.Random(3)) for _ in range(2))
        assert first.shape == (8, 3, 24, 24) and first.dtype == torch.float32
        assert float(first.abs().max()) <= 1
        assert torch.equal(first, again)
        assert not torch.equal(first, draw_prompts(wanted, random.Random(4)))


def test_no_prompts_give_no_pictures() -> None:
    assert draw_prompts([], random.Random(0)).shape == (0, 3, 24, 24)
