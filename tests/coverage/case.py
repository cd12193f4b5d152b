"""What one row of the coverage table is made from: a small model, and inputs for it in several shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch
from torch import nn

from tests.models import HEAD_DIM, HEADS, POOLED_CHANNELS, TEXT_CHANNELS, WIDTH

__all__ = ["HEADS", "HEAD_DIM", "POOLED_CHANNELS", "TEXT_CHANNELS", "WIDTH"]

Kwargs = dict[str, Any]

AXES = (4, 6, 6)
"""How the channels of a head are shared among the axes of a rotary embedding."""

HEADED: dict[str, Any] = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM}


@dataclass(frozen=True)
class Shape:
    """The sizes of one call.

    Attributes:
        batch: samples.
        height: rows of the latent picture; two make a row of tokens.
        width: its columns.
        text: text tokens.
        frames: latent frames of a video.
        padding: text tokens of the last sample that are padding, where the model takes a mask or lengths.
        seed: of all random values.
    """

    batch: int = 2
    height: int = 8
    width: int = 8
    text: int = 5
    frames: int = 3
    padding: int = 1
    seed: int = 1

    @property
    def tokens(self) -> int:
        """Image tokens of one frame."""
        return (self.height // 2) * (self.width // 2)


EXAMPLE = Shape()
OTHERS = {
    "batch": replace(EXAMPLE, batch=3),
    "size": replace(EXAMPLE, height=12, frames=5),
    "text": replace(EXAMPLE, text=7),
    "values": replace(EXAMPLE, padding=2, seed=2),
}
"""What the trace is called with besides its example; each differs from it in one thing."""


@dataclass(frozen=True)
class Draw:
    """Random inputs, the same each time."""

    shape: Shape
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "generator", torch.Generator().manual_seed(self.shape.seed))

    def normal(self, *size: int) -> torch.Tensor:
        """Normal values."""
        return torch.randn(*size, generator=self.generator)

    def times(self, scale: float = 1.0) -> torch.Tensor:
        """One timestep for each sample, all different, in (0, `scale`)."""
        return scale * (0.05 + 0.9 * torch.rand(self.shape.batch, generator=self.generator))

    def steps(self) -> torch.Tensor:
        """One whole-numbered timestep for each sample."""
        return torch.randint(1, 999, (self.shape.batch,), generator=self.generator)

    def text(self, channels: int = TEXT_CHANNELS) -> torch.Tensor:
        """Text states ``[batch, text, channels]``."""
        return self.normal(self.shape.batch, self.shape.text, channels)

    def latents(self, channels: int = 4) -> torch.Tensor:
        """A picture ``[batch, channels, height, width]``."""
        return self.normal(self.shape.batch, channels, self.shape.height, self.shape.width)

    def video(self, channels: int = 4) -> torch.Tensor:
        """A video ``[batch, channels, frames, height, width]``."""
        s = self.shape
        return self.normal(s.batch, channels, s.frames, s.height, s.width)

    def mask(self, dtype: torch.dtype = torch.bool, text: int | None = None) -> torch.Tensor:
        """Which text tokens are valid: all but the last ones of the last sample."""
        valid = torch.ones(self.shape.batch, text or self.shape.text, dtype=dtype)
        valid[-1, -self.shape.padding :] = 0
        return valid


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: the class, as diffusers exports it.
        build: makes a small model of it, in evaluation mode.
        inputs: makes the complete keyword arguments of a call, as a pipeline passes them.
        variant: what sets this row apart from others of the same class.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[Draw], Kwargs]
    variant: str = ""

    @property
    def id(self) -> str:
        """The name with the variant."""
        return f"{self.name} ({self.variant})" if self.variant else self.name

    def kwargs(self, shape: Shape = EXAMPLE) -> Kwargs:
        """Return a call of the given sizes."""
        return {**self.inputs(Draw(shape)), "return_dict": False}


def small(name: str, config: Mapping[str, Any], inputs: Callable[[Draw], Kwargs], variant: str = "") -> Case:
    """Return the case of a diffusers class by its configuration; the weights are the same each time."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = getattr(diffusers, name)(**config).eval()
            _wake(model)
        return model

    return Case(name, build, inputs, variant)


def _wake(model: nn.Module) -> None:
    """Give every matrix random values: some are not initialised at all, and shut gates would hide every mistake."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() == 0:
                continue
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif not parameter.any():
                parameter.normal_(std=0.1)


def grid(rows: int, columns: int, *front: int) -> torch.Tensor:
    """Positions of image tokens, ``[rows * columns, len(front) + 2]``."""
    y = torch.arange(rows).repeat_interleave(columns)
    x = torch.arange(columns).repeat(rows)
    return torch.stack([*(torch.full_like(y, value) for value in front), y, x], dim=-1).float()
