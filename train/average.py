"""An exponential moving average of what trains (EMA), which then is the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ppcl_fx.train.executor import Groups
from ppcl_fx.train.masters import Masters


class Average:
    """Float32 averages of the masters' parameters, edit by edit.

    Args:
        masters: What the optimiser updates.
        decay: How much of the average stays at each step; None for no average.
    """

    def __init__(self, masters: Masters, decay: float | None) -> None:
        self._masters = masters
        self._decay = decay
        self._numbers = {edit: number for number, edit in enumerate(masters.groups)}
        followed: Groups = {} if decay is None else masters.groups
        self._values = {
            edit: [p.detach().to(torch.float32, copy=True) for p in parameters]
            for edit, parameters in followed.items()
        }

    def update(self, step: int) -> None:
        """Move towards the weights after update number `step` (from 0); faster at first, or it would stay at
        the start.
        """
        if self._decay is None:
            return
        share = 1.0 - min(self._decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for edit, values in self._values.items():
                for value, parameter in zip(values, self._masters.groups[edit], strict=True):
                    value.lerp_(parameter.float(), share)

    def settle(self, edit: str) -> None:
        """Make an edit's average its weights, and follow it no further."""
        self._put(edit, self._values.pop(edit, []))

    def forget(self, edit: str) -> None:
        """Follow an edit no further and leave its weights as they are."""
        self._values.pop(edit, None)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Let the model have the averages as its weights for a while."""
        kept = {edit: [p.detach().clone() for p in self._masters.groups[edit]] for edit in self._values}
        try:
            for edit, values in self._values.items():
                self._put(edit, values)
            yield
        finally:
            for edit, values in kept.items():
                self._put(edit, values)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold of the averages."""
        return {
            f"average.{self._numbers[edit]}.{i}": value
            for edit, values in self._values.items()
            for i, value in enumerate(values)
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set what `tensors` returned; other names are left alone."""
        for name, value in self.tensors().items():
            if name in tensors:
                value.copy_(tensors[name])

    def _put(self, edit: str, values: list[Tensor]) -> None:
        if not values:
            return
        with torch.no_grad():
            for parameter, value in zip(self._masters.groups[edit], values, strict=True):
                parameter.copy_(value)
        self._masters.write_back()
