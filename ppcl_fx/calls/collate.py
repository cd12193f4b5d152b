"""A recorded call, its values (tensors, and what JSON knows), and several calls as one, joined along the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ppcl_fx.errors import PpclError
from ppcl_fx.io.shards import is_finite

AGAIN = "record the calls again"
_APART = "run these calls one by one"


@dataclass(frozen=True)
class Call:
    """One call of the transformer.

    Attributes:
        kwargs: the arguments by name, as the transformer got them; tensors are on the CPU.
        prompts: the prompts of the pictures that this call helped to draw.
        timestep: the value the transformer got (its first element).
        index: position in the recording, from 0.
        batch: samples in the call, the size of dimension 0 of the batched tensors; it may be several a prompt.
        branch: which call of its denoising step this is, from 0: guidance may call once for each branch.
        output: what the transformer returned, its first tensor, on the CPU; None where it was not recorded.
    """

    kwargs: dict[str, Any]
    prompts: tuple[str, ...]
    timestep: float
    index: int
    batch: int
    branch: int = 0
    output: torch.Tensor | None = None


def map_tensors(value: Any, change: Callable[[str, torch.Tensor], Any], path: str = "") -> Any:
    """Return `value` with every tensor in its lists, tuples and dicts replaced by ``change(path, tensor)``.

    PpclError where it holds something that is neither a tensor nor known to JSON.
    """
    if isinstance(value, torch.Tensor):
        return change(path, value)
    if isinstance(value, list | tuple):
        items = [map_tensors(item, change, f"{path}.{i}") for i, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {k: map_tensors(item, change, f"{path}.{k}" if path else k) for k, item in value.items()}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise PpclError(f"argument {path!r} is {value}; calls must be finite")
        return value
    what = "a dict whose keys are not all strings" if isinstance(value, dict) else f"a {type(value).__name__}"
    raise PpclError(f"argument {path!r} is {what}; calls hold tensors, numbers, strings, lists, tuples and dicts")


def check_finite(tensor: torch.Tensor, where: str) -> None:
    """Raise a PpclError that begins with `where` when a floating-point tensor holds NaN or infinity."""
    if not is_finite(tensor):
        raise PpclError(f"{where} holds NaN or infinity; {AGAIN} (a float16 model may need bfloat16)")


def collate(calls: Sequence[Call]) -> dict[str, Any]:
    """Return the arguments of one call that does the work of several, joined along the batch.

    Tensors whose dimension 0 is the batch are concatenated, lists as long as the batch are extended; lists of
    batched tensors, tuples and dicts are joined item by item. PpclError where there are no calls, anything else is not
    equal in all of them, or a tensor might as well be batched as not.
    """
    if not calls:
        raise PpclError("there are no calls to join; give at least one")
    for name in sorted({name for call in calls for name in call.kwargs}):
        without = next((call.index for call in calls if name not in call.kwargs), None)
        if without is not None:
            raise PpclError(f"call {without} has no argument {name!r} and others have; {_APART}")
    join = _Join(calls)
    return {name: join([call.kwargs[name] for call in calls], name) for name in calls[0].kwargs}


class _Join:
    def __init__(self, calls: Sequence[Call]) -> None:
        self.indices = [call.index for call in calls]
        self.batches = [call.batch for call in calls]
        # The tokens of each [batch, tokens, channels] argument: what else a dimension 0 could be.
        self.tokens = {t.shape[1] for c in calls for t in c.kwargs.values() if _rank(t) == 3}

    def __call__(self, values: list[Any], path: str) -> Any:
        first = values[0]
        if len({type(value) for value in values}) > 1:
            raise self._differ(path, "is of several types")
        if len(values) == 1:
            return first
        if isinstance(first, torch.Tensor):
            return self._tensors(values, path)
        if isinstance(first, list | tuple):
            lengths = [len(value) for value in values]
            batched = len(set(lengths)) == 1 and any(map(self._batched, zip(*values, strict=True)))
            if isinstance(first, list) and lengths == self.batches and not batched:
                return [item for value in values for item in value]  # one a sample
            if len(set(lengths)) > 1:
                raise self._differ(path, "has several lengths")
            items = [self(list(items), f"{path}.{i}") for i, items in enumerate(zip(*values, strict=True))]
            return tuple(items) if isinstance(first, tuple) else items
        if isinstance(first, dict):
            if any(value.keys() != first.keys() for value in values):
                raise self._differ(path, "has several sets of keys")
            return {key: self([value[key] for value in values], f"{path}.{key}") for key in first}
        if any(value != first for value in values):
            raise self._differ(path, "has several values")
        return first

    def _tensors(self, values: list[torch.Tensor], path: str) -> torch.Tensor:
        first = values[0]
        if self._batched(values):
            if first.ndim == 2 and first.shape[0] in self.tokens and first.shape[1] not in self.tokens:
                either = f"{list(first.shape)}, one row a sample or one a token"
                raise PpclError(f"{path!r} is {either}; record with another batch size")
            if len({(value.shape[1:], value.dtype) for value in values}) > 1:
                raise self._differ(path, f"has the shapes {', '.join(str(list(v.shape)) for v in values)}")
            return torch.cat(values)
        if any(value.dtype != first.dtype or not torch.equal(value, first) for value in values):
            raise self._differ(path, "is not batched and has several values")
        return first

    def _batched(self, values: Sequence[Any]) -> bool:
        return all(_rank(v) > 0 and v.shape[0] == batch for v, batch in zip(values, self.batches, strict=True))

    def _differ(self, path: str, how: str) -> PpclError:
        return PpclError(f"calls {', '.join(map(str, self.indices))} cannot be joined: {path!r} {how}; {_APART}")


def _rank(value: Any) -> int:
    return value.ndim if isinstance(value, torch.Tensor) else 0
