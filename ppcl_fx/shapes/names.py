"""The names of the things that the shapes model draws."""

from __future__ import annotations

SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
COLOURS: tuple[str, ...] = ("red", "green", "blue", "yellow")
