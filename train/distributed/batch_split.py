"""A batch split over ranks: each gets consecutive samples of it, whatever calls they were recorded in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ppcl_fx.calls.store import Call
from ppcl_fx.train.distributed.process_group import ProcessGroup


class SplitBatch(dict[str, Any]):
    """One rank's part of a batch: the transformer's arguments, like any batch's.

    `samples` are in it, of `total` in the whole batch. Where there are fewer samples than ranks it has none: its
    arguments are then one of another rank's, to be computed (all ranks must take part) and not to be counted.
    """

    def __init__(self, kwargs: dict[str, Any], samples: int, total: int) -> None:
        super().__init__(kwargs)
        self.samples, self.total = samples, total


def portion(total: int, ranks: ProcessGroup) -> tuple[int, int, int]:
    """Return a rank's first sample of `total`, the one after its last, and how many of them count (see `SplitBatch`).

    Portions are in the order of the ranks and differ by one sample at most.
    """
    first, last = total * ranks.rank // ranks.world, total * (ranks.rank + 1) // ranks.world
    if first < last:
        return first, last, last - first
    at = min(first, total - 1)
    return at, at + 1, 0


def cut(calls: Sequence[Call], first: int, last: int) -> list[Call]:
    """Return the samples `first` to `last` (exclusive) of consecutive calls, as calls."""
    found: list[Call] = []
    begin = 0
    for call in calls:
        low, high = max(first - begin, 0), min(last - begin, call.batch)
        if high - low == call.batch:
            found.append(call)
        elif low < high:
            kwargs = {name: _part(value, call.batch, low, high) for name, value in call.kwargs.items()}
            found.append(replace(call, kwargs=kwargs, batch=high - low))
        begin += call.batch
    return found


def _part(value: Any, batch: int, low: int, high: int) -> Any:
    """The same rules as `ppcl_fx.calls.collate.collate`, read backwards."""
    if isinstance(value, Tensor):
        return value[low:high] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {name: _part(item, batch, low, high) for name, item in value.items()}
    if isinstance(value, list | tuple):
        batched = any(isinstance(item, Tensor) and item.ndim and item.shape[0] == batch for item in value)
        if isinstance(value, list) and len(value) == batch and not batched:
            return value[low:high]
        items = [_part(item, batch, low, high) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value
