"""The values that recorded calls may hold: tensors, and what JSON knows; none of them NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ppcl_fx.errors import PpclError
from ppcl_fx.shards import is_finite

AGAIN = "record the calls again"


def map_tensors(value: Any, change: Callable[[str, torch.Tensor], Any], path: str = "") -> Any:
    """Return `value` with every tensor in its lists, tuples and dicts replaced by ``change(path, tensor)``.

    Raises:
        PpclError: `value` holds something that is neither a tensor nor known to JSON.
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
    raise PpclError(
        f"argument {path!r} is {what}; calls hold tensors, numbers, strings, lists, tuples and dicts"
    )


def check_finite(tensor: torch.Tensor, where: str) -> None:
    """Raise a PpclError that begins with `where` when a floating-point tensor holds NaN or infinity."""
    if not is_finite(tensor):
        raise PpclError(f"{where} holds NaN or infinity; {AGAIN} (a float16 model may need bfloat16)")
