"""Let a list be repeated as often as there are samples while their number is open: ``torch.tensor([0] * batch)``.

Python asks for the number when it repeats a list, and an export then holds for that number alone. Here the list is
remembered with the open number, and a tensor made of it is one of open size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Repeated(Sequence[Any]):
    """A list repeated an open number of times. To read an item is to fix the number, as without it."""

    def __init__(self, items: list[Any], times: torch.SymInt) -> None:
        self.items = items
        self.times = times

    def __len__(self) -> int:
        return len(self.items) * int(self.times)

    def __getitem__(self, index: Any) -> Any:
        return (self.items * int(self.times))[index]


class _TensorsOfRepeated(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and args and isinstance(args[0], Repeated):
            once = func(args[0].items, *args[1:], **given)
            return once.repeat(args[0].times, *[1] * (once.ndim - 1))
        return func(*args, **given)


@contextlib.contextmanager
def open_repeats() -> Iterator[None]:
    """Within it, a list times a symbolic number is a `Repeated`, and ``torch.tensor`` of that has the open size."""
    original = torch.SymInt.__rmul__

    def times(self: torch.SymInt, other: Any) -> Any:
        return Repeated(other, self) if type(other) is list and other else original(self, other)

    torch.SymInt.__rmul__ = times  # type: ignore[method-assign]
    try:
        with _TensorsOfRepeated():
            yield
    finally:
        torch.SymInt.__rmul__ = original  # type: ignore[method-assign]
