"""Draw small pictures of coloured shapes: the data that the shapes model learns from.

A picture is 24x24 RGB with values in [-1, 1].  It is cut into a 3x3 grid of 8x8 cells on one plain
background.  An object fills one cell, moved by up to 0.75 px from its middle along each axis, so
objects never touch.  Edges are anti-aliased: every pixel is the mean of 8x8 sub-samples.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ppcl_fx.shapes.captions import SHAPES

SIZE = 24
"""Side of a picture in pixels."""
CELL = 8
"""Side of a cell in pixels."""
GRID = SIZE // CELL
"""Cells along each axis."""
OFFSETS: tuple[float, ...] = tuple(0.25 * step for step in range(-3, 4))
"""Distances in pixels by which an object may sit off the middle of its cell, along each axis."""

BACKGROUND: tuple[float, float, float] = (-0.76, -0.76, -0.72)
"""RGB of the background."""
PALETTE: tuple[tuple[float, float, float], ...] = (
    (0.85, -0.70, -0.70),
    (-0.70, 0.55, -0.50),
    (-0.60, -0.25, 0.95),
    (0.92, 0.75, -0.70),
)
"""RGB of each colour, in the order of ``COLOURS``."""

_SAMPLES = 8
_CIRCLE_RADIUS = 2.8
_SQUARE_HALF = 2.5
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
    """Return the coverage of one cell by every object that can be drawn.

    Returns:
        Shares of each pixel covered, in [0, 1], of shape (3 shapes, 7 y offsets, 7 x offsets, 8, 8).
        Do not write to it: it is shared.
    """
    steps = (torch.arange(CELL * _SAMPLES) + 0.5) / _SAMPLES - CELL / 2
    moves = torch.tensor(OFFSETS)
    y = (steps[None, :] - moves[:, None])[:, None, :, None]
    x = (steps[None, :] - moves[:, None])[None, :, None, :]
    masks = torch.stack([_inside(shape, x, y).float() for shape in SHAPES])
    count = len(OFFSETS)
    return masks.reshape(len(SHAPES), count, count, CELL, _SAMPLES, CELL, _SAMPLES).mean(dim=(4, 6))


def draw(shapes: torch.Tensor, colours: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Draw a batch of scenes.

    Args:
        shapes: integers of shape (batch, 9): an index into ``SHAPES`` for each cell in reading order,
            or -1 for an empty cell.
        colours: integers of shape (batch, 9): an index into ``COLOURS``; ignored in empty cells.
        offsets: integers of shape (batch, 9, 2): indices into ``OFFSETS`` along y and x.

    Returns:
        Pictures of shape (batch, 3, 24, 24), float32 in [-1, 1].
    """
    batch = shapes.shape[0]
    table = sprites()
    cover = table[shapes.clamp(min=0), offsets[..., 0], offsets[..., 1]]
    cover = cover * (shapes >= 0)[..., None, None]
    background = torch.tensor(BACKGROUND)
    ink = torch.tensor(PALETTE)[colours.clamp(min=0)] - background
    cells = cover[:, :, None] * ink[:, :, :, None, None]
    cells = cells.reshape(batch, GRID, GRID, 3, CELL, CELL).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(batch, 3, SIZE, SIZE) + background[:, None, None]
