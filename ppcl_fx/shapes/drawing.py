"""Draw small pictures of coloured shapes: the data that the shapes model learns from.

A picture is 24x24 RGB with values in [-1, 1], a 3x3 grid of 8x8 cells on one plain background. An object fills one
cell, moved by up to 0.75 px along each axis, so objects never touch. Every pixel is the mean of 8x8 sub-samples.
"""

from __future__ import annotations

import itertools
import random
from functools import lru_cache

import torch

from ppcl_fx.shapes.captions import COLOURS, RELATIONS, SHAPES, Prompt

SIZE = 24  # side of a picture in pixels
CELL = 8  # side of a cell in pixels
GRID = SIZE // CELL  # cells along each axis
CELLS = GRID * GRID
OFFSETS: tuple[float, ...] = tuple(0.25 * step for step in range(-3, 4))
"""Distances in pixels by which an object may sit off the middle of its cell, along each axis."""
BACKGROUND: tuple[float, float, float] = (-0.76, -0.76, -0.72)  # RGB of the background
PALETTE: tuple[tuple[float, float, float], ...] = (
    (0.85, -0.70, -0.70),
    (-0.70, 0.55, -0.50),
    (-0.60, -0.25, 0.95),
    (0.92, 0.75, -0.70),
)
"""RGB of each colour, in the order of ``COLOURS``."""
_SAMPLES = 8
_CIRCLE_RADIUS, _SQUARE_HALF = 2.8, 2.5
_TRIANGLE_TOP, _TRIANGLE_BOTTOM, _TRIANGLE_HALF = -3.0, 2.8, 2.8


def _inside(shape: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Say which points, in pixels from the object's middle, lie inside a shape (y grows downwards)."""
    if shape == "circle":
        return x * x + y * y <= _CIRCLE_RADIUS**2
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) <= _SQUARE_HALF
    slope = _TRIANGLE_HALF / (_TRIANGLE_BOTTOM - _TRIANGLE_TOP)
    return (y <= _TRIANGLE_BOTTOM) & (x.abs() <= (y - _TRIANGLE_TOP) * slope)


@lru_cache(maxsize=1)
def sprites() -> torch.Tensor:
    """Return the coverage of one cell by every object that can be drawn; it is shared, do not write to it.

    The shares of each pixel covered, in [0, 1], are of shape (3 shapes, 7 y offsets, 7 x offsets, 8, 8).
    """
    steps = (torch.arange(CELL * _SAMPLES) + 0.5) / _SAMPLES - CELL / 2
    away = steps[None, :] - torch.tensor(OFFSETS)[:, None]
    y, x = away[:, None, :, None], away[None, :, None, :]
    masks = torch.stack([_inside(shape, x, y).float() for shape in SHAPES])
    count = len(OFFSETS)
    return masks.reshape(len(SHAPES), count, count, CELL, _SAMPLES, CELL, _SAMPLES).mean(dim=(4, 6))


def draw(shapes: torch.Tensor, colours: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Draw a batch of scenes: pictures of shape (batch, 3, 24, 24), float32 in [-1, 1].

    Args:
        shapes: integers of shape (batch, 9): an index into ``SHAPES`` for each cell in reading order,
            or -1 for an empty cell.
        colours: integers of shape (batch, 9): an index into ``COLOURS``; ignored in empty cells.
        offsets: integers of shape (batch, 9, 2): indices into ``OFFSETS`` along y and x.
    """
    cover = sprites()[shapes.clamp(min=0), offsets[..., 0], offsets[..., 1]]
    cover = cover * (shapes >= 0)[..., None, None]
    background = torch.tensor(BACKGROUND)
    ink = torch.tensor(PALETTE)[colours.clamp(min=0)] - background
    cells = cover[:, :, None] * ink[:, :, :, None, None]
    cells = cells.reshape(-1, GRID, GRID, 3, CELL, CELL).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(-1, 3, SIZE, SIZE) + background[:, None, None]


def holds(relation: str, first: tuple[float, float], second: tuple[float, float], least: float) -> bool:
    """Say whether the first point lies, seen from the second, where ``relation`` says.

    Points are (y, x) with y growing downwards. The named direction must be the larger of the two
    differences and be at least ``least``.
    """
    down, right = first[0] - second[0], first[1] - second[1]
    ways = {"left of": (-right, down), "right of": (right, down), "above": (-down, right), "below": (down, right)}
    along, across = ways[relation]
    return along >= least and along > abs(across)


_PAIRS: dict[str, list[tuple[int, int]]] = {
    relation: [
        (a, b)
        for a, b in itertools.product(range(CELLS), repeat=2)
        if holds(relation, divmod(a, GRID), divmod(b, GRID), 1.0)
    ]
    for relation in RELATIONS
}
"""The pairs of cells that stand in each relation."""


def draw_prompts(prompts: list[Prompt], source: random.Random) -> torch.Tensor:
    """Draw one random picture that fits each prompt: (len(prompts), 3, 24, 24), float32 in [-1, 1].

    What a prompt leaves open (cells, free colours, small moves) is drawn evenly.
    """
    scenes = torch.tensor([-1, 0, 0, 0]).repeat(len(prompts), CELLS, 1)  # shape, colour, y offset, x offset
    for scene, prompt in zip(scenes, prompts, strict=True):
        if prompt.relation is None:
            cells = source.sample(range(CELLS), len(prompt.shapes))
        else:
            cells = list(source.choice(_PAIRS[prompt.relation]))
        for cell, shape, colour in zip(cells, prompt.shapes, prompt.colours, strict=True):
            ink = source.randrange(len(COLOURS)) if colour is None else COLOURS.index(colour)
            moves = source.randrange(len(OFFSETS)), source.randrange(len(OFFSETS))
            scene[cell] = torch.tensor([SHAPES.index(shape), ink, *moves])
    return draw(scenes[..., 0], scenes[..., 1], scenes[..., 2:])
