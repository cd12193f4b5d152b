"""Make scenes that fit a prompt, and draw them."""

from __future__ import annotations

import itertools
import random

import torch

from ppcl_fx.shapes.captions import COLOURS, RELATIONS, SHAPES, Prompt
from ppcl_fx.shapes.drawing import GRID, OFFSETS, draw

_CELLS = GRID * GRID


def holds(relation: str, first: tuple[float, float], second: tuple[float, float], least: float) -> bool:
    """Say whether the first point lies, seen from the second, where ``relation`` says.

    Points are (y, x) with y growing downwards.  The named direction must be the larger of the two
    differences and be at least ``least``.
    """
    down, right = first[0] - second[0], first[1] - second[1]
    along, across = {
        "left of": (-right, down),
        "right of": (right, down),
        "above": (-down, right),
        "below": (down, right),
    }[relation]
    return along >= least and along > abs(across)


_PAIRS: dict[str, list[tuple[int, int]]] = {
    relation: [
        (a, b)
        for a, b in itertools.product(range(_CELLS), repeat=2)
        if holds(relation, divmod(a, GRID), divmod(b, GRID), 1.0)
    ]
    for relation in RELATIONS
}
"""The pairs of cells that stand in each relation."""


def _place(prompt: Prompt, source: random.Random) -> list[tuple[int, int, int, int, int]]:
    """Choose (cell, shape, colour, y offset, x offset) for each object of a prompt."""
    if prompt.relation is None:
        cells = source.sample(range(_CELLS), len(prompt.shapes))
    else:
        cells = list(source.choice(_PAIRS[prompt.relation]))
    objects = []
    for cell, shape, colour in zip(cells, prompt.shapes, prompt.colours, strict=True):
        ink = source.randrange(len(COLOURS)) if colour is None else COLOURS.index(colour)
        moves = source.randrange(len(OFFSETS)), source.randrange(len(OFFSETS))
        objects.append((cell, SHAPES.index(shape), ink, *moves))
    return objects


def draw_prompts(prompts: list[Prompt], source: random.Random) -> torch.Tensor:
    """Draw one random picture that fits each prompt.

    What a prompt leaves open (cells, free colours, small moves) is drawn evenly.

    Returns:
        Pictures of shape (len(prompts), 3, 24, 24), float32 in [-1, 1].
    """
    shapes = [[-1] * _CELLS for _ in prompts]
    colours = [[0] * _CELLS for _ in prompts]
    offsets = [[(0, 0)] * _CELLS for _ in prompts]
    for row, prompt in enumerate(prompts):
        for cell, shape, colour, down, right in _place(prompt, source):
            shapes[row][cell], colours[row][cell], offsets[row][cell] = shape, colour, (down, right)
    return draw(
        torch.tensor(shapes, dtype=torch.long).reshape(-1, _CELLS),
        torch.tensor(colours, dtype=torch.long).reshape(-1, _CELLS),
        torch.tensor(offsets, dtype=torch.long).reshape(-1, _CELLS, 2),
    )
