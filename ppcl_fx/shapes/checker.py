"""Read the objects back from the pixels of a picture, and say whether it shows what a prompt asks.

It finds the patches that differ from the background, then names the shape and the colour of each by the best fitting
sprite. One that fits no sprite, or whose colour is off, is an unknown object, and a picture with one is always wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from ppcl_fx.errors import PpclError
from ppcl_fx.shapes.captions import COLOURS, SHAPES, Prompt
from ppcl_fx.shapes.drawing import BACKGROUND, CELL, PALETTE, SIZE, holds, sprites

COVERED = 0.6  # a pixel is an object's when its colour is further than this share of the way from the background
SPECK = 4  # patches of fewer pixels than this are ignored
COLOUR_LIMIT = 0.6  # largest distance of an object's colour from the palette's colour (RGB units)
MISFIT_LIMIT = 0.25
"""Largest squared misfit of an object to its best sprite, as a share of the sprite's own square."""
RELATION_PIXELS = 4.0  # least distance along the named direction for a relation to hold

_BACKGROUND = torch.tensor(BACKGROUND)
_INKS = torch.tensor(PALETTE) - _BACKGROUND


@dataclass(frozen=True)
class Found:
    """An object read from a picture: its shape and colour (None when unknown) and its middle in pixels."""

    shape: str | None
    colour: str | None
    y: float
    x: float


def _components(mask: torch.Tensor) -> list[torch.Tensor]:
    """Return the 4-connected patches of a mask (24, 24), in reading order of their last pixel."""
    labels = torch.arange(1, mask.numel() + 1).reshape(mask.shape) * mask
    while True:
        padded = functional.pad(labels, (1, 1, 1, 1))
        around = [labels, padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
        spread = torch.stack(around).amax(dim=0) * mask
        if torch.equal(spread, labels):
            return [labels == label for label in labels.unique().tolist() if label]
        labels = spread


def _coverage(picture: torch.Tensor) -> torch.Tensor:
    """Return how far each pixel (24, 24) is on its way from the background to its likeliest colour."""
    way = picture.permute(1, 2, 0) - _BACKGROUND
    length = _INKS.norm(dim=1)
    likeliest = (way @ (_INKS / length[:, None]).T).argmax(dim=-1)
    coverage: torch.Tensor = way.norm(dim=-1) / length[likeliest]
    return coverage


def _name_colour(pixels: torch.Tensor) -> tuple[int, bool]:
    """Return the palette's nearest colour to an object's strongest pixels, and whether it is near enough."""
    strength = (pixels - _BACKGROUND).norm(dim=-1)
    core = pixels[strength.topk(max(1, len(pixels) // 2)).indices].median(dim=0).values
    distance = (torch.tensor(PALETTE) - core).norm(dim=-1)
    best = int(distance.argmin())
    return best, bool(distance[best] <= COLOUR_LIMIT)


def _name_shape(cover: torch.Tensor, y: float, x: float) -> str | None:
    """Return the shape whose sprite best fits a coverage map (24, 24) near a middle, if any fits.

    All sprites are tried in the nine cells that start within one pixel of the cell around the middle.
    """
    padded = functional.pad(cover, (CELL, CELL, CELL, CELL))
    top, left = (round(middle - (CELL - 1) / 2) + CELL - 1 for middle in (y, x))
    area = padded[top : top + CELL + 2, left : left + CELL + 2]
    windows = area.unfold(0, CELL, 1).unfold(1, CELL, 1).reshape(-1, CELL * CELL)
    table = sprites().flatten(0, 2).flatten(1)
    weight = table.square().sum(dim=1)
    misfit = (weight[:, None] - 2 * table @ windows.T + cover.square().sum()) / weight[:, None]
    best = misfit.reshape(len(SHAPES), -1).amin(dim=1)
    index = int(best.argmin())
    return SHAPES[index] if float(best[index]) <= MISFIT_LIMIT else None


def _read(picture: torch.Tensor, patch: torch.Tensor, others: torch.Tensor) -> Found:
    """Name the object that covers ``patch``; ``others`` marks the pixels of all other patches."""
    rows, columns = torch.nonzero(patch, as_tuple=True)
    y, x = float(rows.float().mean()), float(columns.float().mean())
    colour, near = _name_colour(picture[:, patch].T)
    ink = _INKS[colour]
    cover = ((picture.permute(1, 2, 0) - _BACKGROUND) @ ink / (ink @ ink)).clamp(0, 1)
    halo = functional.max_pool2d(patch[None, None].float(), 3, 1, 1)[0, 0].bool()
    return Found(_name_shape(cover * (halo & ~others), y, x), COLOURS[colour] if near else None, y, x)


def find_objects(picture: torch.Tensor) -> list[Found]:
    """Read the objects of one picture of shape (3, 24, 24), values in [-1, 1]; PpclError where it has another shape."""
    if picture.shape != (3, SIZE, SIZE):
        raise PpclError(f"picture has shape {tuple(picture.shape)}; give (3, {SIZE}, {SIZE})")
    picture = picture.detach().float().cpu()
    patches = [patch for patch in _components(_coverage(picture) > COVERED) if int(patch.sum()) >= SPECK]
    everything = sum(patches, start=torch.zeros(SIZE, SIZE, dtype=torch.bool))
    return [_read(picture, patch, everything & ~patch) for patch in patches]


def check(picture: torch.Tensor, prompt: Prompt) -> int:
    """Return 1 when a picture (3, 24, 24) in [-1, 1] shows just what a prompt asks, else 0.

    All objects count: a missing, an extra or an unknown object makes the picture wrong.
    """
    found = find_objects(picture)
    if len(found) != len(prompt.shapes):
        return 0
    if len(found) == 2 and prompt.shapes[0] != prompt.shapes[1] and found[0].shape != prompt.shapes[0]:
        found = found[::-1]
    for item, shape, colour in zip(found, prompt.shapes, prompt.colours, strict=True):
        if item.shape != shape or item.colour is None or colour not in (None, item.colour):
            return 0
    if prompt.relation is None:
        return 1
    first, second = found
    return int(holds(prompt.relation, (first.y, first.x), (second.y, second.x), RELATION_PIXELS))
