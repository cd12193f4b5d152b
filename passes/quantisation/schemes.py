"""How a weight is stored in few bits: INT8 and INT4 by blocks of a row, FP8 (e4m3), each with scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ppcl_fx.errors import PpclError
from ppcl_fx.io.shards import Form

Weights = Literal["int8", "int4", "fp8"]
AGAIN = "export them again"
LARGEST: dict[Weights, float] = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
"""The largest stored value of each; -8 is not used, so that a weight and its negative round alike."""
SHRINKS = torch.linspace(1.0, 0.6, 17)
"""Shares of a block's largest weight that a scale may reach: what lies beyond is clipped, the rest becomes finer."""


@dataclass(frozen=True)
class Scheme:
    """A way to store weights.

    Attributes:
        weights: the type of a stored value.
        block: weights of a row that share a scale; None for one scale a row.
        scale: the dtype of the scales, the one that the layer computes in.
    """

    weights: Weights
    block: int | None = None
    scale: torch.dtype = torch.float32

    @property
    def largest(self) -> float:
        """The largest stored value."""
        return LARGEST[self.weights]

    @property
    def stored(self) -> torch.dtype:
        """The dtype of values in memory; INT4 takes a byte each there."""
        return torch.float8_e4m3fn if self.weights == "fp8" else torch.int8

    def fits(self, columns: int) -> bool:
        """Tell whether blocks divide the columns of a weight, and its rows fill whole bytes."""
        return columns % (self.block or 1) == 0 and (self.weights != "int4" or columns % 2 == 0)

    def width(self, columns: int) -> int:
        """Return how many columns of a weight, which fits, share a scale."""
        assert self.fits(columns), (self, columns)
        return self.block or columns

    def input_scale(self, largest: float) -> float | None:
        """Return the scale of inputs up to `largest` that are stored as the weights are; None where they are not."""
        if self.weights != "fp8":
            return None
        scale = float(torch.tensor(largest / self.largest).to(self.scale))
        return scale if scale > 0 else 1.0

    def forms(self, shape: tuple[int, ...]) -> tuple[Form, Form]:
        """Return dtype and shape of the stored values and of the scales of a weight ``[rows, columns]``."""
        rows, columns = shape
        small = self.weights == "int4"
        values = (torch.uint8 if small else self.stored, (rows, columns // 2 if small else columns))
        return values, (self.scale, (rows, columns // self.width(columns)))

    def stored_inputs(self, x: Tensor, scale: float | None) -> Tensor:
        """Return a layer's inputs as they come back from being stored with a scale; without one as they are."""
        if scale is None:
            return x
        by = torch.tensor(scale, dtype=x.dtype, device=x.device)
        return self.snap(x / by) * by

    def snap(self, values: Tensor) -> Tensor:
        """Return float values rounded to the nearest that can be stored, as floats."""
        bounded = values.clamp(-self.largest, self.largest)
        return bounded.to(self.stored).to(values.dtype) if self.weights == "fp8" else bounded.round()

    def scales(self, columns: Tensor, importance: Tensor) -> Tensor:
        """Return the scale of each row of a block of weights: the one with the least weighted squared error.

        Args:
            columns: ``[rows, block]``.
            importance: how much an error in each column counts, ``[block]``: the mean square of its input.
        """
        whole = columns.abs().amax(dim=1) / self.largest
        whole = torch.where(whole > 0, whole, torch.ones_like(whole)).to(self.scale)
        whole = torch.where(whole > 0, whole, torch.finfo(self.scale).smallest_normal).to(columns.dtype)
        best, least = whole, torch.full_like(whole, torch.inf)
        # FP8 has its steps where the values are: a smaller scale gains nothing.
        for shrink in SHRINKS[: 1 if self.weights == "fp8" else None].tolist():
            scale = (whole * shrink).to(self.scale).to(columns.dtype)
            error = self.snap(columns / scale[:, None]) * scale[:, None] - columns
            loss = (error.square() * importance).sum(dim=1)
            best, least = torch.where(loss < least, scale, best), torch.minimum(loss, least)
        return best


@dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """A weight matrix in few bits.

    Attributes:
        scheme: how it is stored.
        values: ``[rows, columns]``, of the scheme's dtype.
        scales: ``[rows, columns / block]``; a weight is its value times its block's scale.
        inputs: for FP8 the scale of the layer's inputs, which are stored in FP8 too; None where they stay as they are.
    """

    scheme: Scheme
    values: Tensor
    scales: Tensor
    inputs: float | None = None

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights, ``[rows, columns]``, multiplied in the dtype as engines do it."""
        scales = self.scales.to(dtype).repeat_interleave(self.values.shape[1] // self.scales.shape[1], dim=1)
        return self.values.to(dtype) * scales

    @classmethod
    def joined(cls, parts: Sequence[QuantisedWeight]) -> QuantisedWeight:
        """Return rows put one behind the other as one weight."""
        values, scales = torch.cat([part.values for part in parts]), torch.cat([part.scales for part in parts])
        return parts[0] if len(parts) == 1 else replace(parts[0], values=values, scales=scales)

    def rows(self, first: int, count: int) -> QuantisedWeight:
        """Return some of its rows, as a view."""
        return replace(self, values=self.values[first : first + count], scales=self.scales[first : first + count])

    def packed(self) -> Tensor:
        """Return the values as ONNX stores them: two of INT4 a byte, the first in the low half."""
        if self.scheme.weights != "int4":
            return self.values
        pairs = self.values.reshape(-1, 2).to(torch.int32) & 15
        return (pairs[:, 0] | pairs[:, 1] << 4).to(torch.uint8).reshape(len(self.values), -1)

    @classmethod
    def unpacked(cls, scheme: Scheme, data: Tensor, scales: Tensor, inputs: float | None = None) -> QuantisedWeight:
        """Read what `packed` returned.

        Raises:
            PpclError: values and scales do not fit each other.
        """
        if data.ndim != 2 or data.itemsize != 1:
            raise PpclError(f"quantised weights are stored as {data.dtype} {list(data.shape)}; {AGAIN}")
        values = data.view(scheme.stored) if scheme.weights != "int4" else data
        if scheme.weights == "int4":
            wide = data.to(torch.int32)
            halves = torch.stack([wide & 15, wide >> 4], dim=-1).reshape(len(data), -1)
            values = torch.where(halves > 7, halves - 16, halves).to(torch.int8)
        if scales.ndim != 2 or len(scales) != len(values) or values.shape[1] % scales.shape[1]:
            raise PpclError(
                f"quantised weights {list(values.shape)} with scales {list(scales.shape)}: these are not of the same "
                f"weights; {AGAIN}"
            )
        return cls(scheme, values, scales, inputs)
