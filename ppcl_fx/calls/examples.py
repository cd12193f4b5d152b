"""The shapes of a call as validated JSON, so that a saved model can be traced again without its calls."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import JsonValue

from ppcl_fx.calls.kinds import Examples, Size, Sizes, ones_shape
from ppcl_fx.errors import PpclError, near
from ppcl_fx.io.configurations import check_numbers

MOST_ELEMENTS = 2**34
"""Elements that an argument of a call may have: a hundred times those of a film's latents."""
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
}


def describe(value: Any, ones: Sizes | None = None) -> JsonValue:
    """Describe a call's argument: tensors by shape and dtype, everything else as it is.

    Args:
        value: the argument.
        ones: for a tensor that stands for ones where it is missing, their shape (`ppcl_fx.calls.kinds.Examples`).

    Raises:
        PpclError: the value is of a kind that JSON cannot hold.
    """
    if isinstance(value, torch.Tensor):
        form: dict[str, JsonValue] = {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        if ones is not None:
            form["ones"] = [size if isinstance(size, int) else list(size) for size in ones]
        return {"tensor": form}
    if isinstance(value, (list, tuple)):
        return {"tuple" if isinstance(value, tuple) else "list": [describe(item) for item in value]}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {"dict": {key: describe(item) for key, item in value.items()}}
        return {"pairs": [[describe(key), describe(item)] for key, item in value.items()]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise PpclError(f"an argument of type {type(value).__name__} cannot be saved; record calls with plain values")


def build_call(
    description: Mapping[str, JsonValue], dtypes: Mapping[torch.dtype, torch.dtype] | None = None, where: str = "model"
) -> Examples:
    """Turn the descriptions of a call's arguments back into a call to trace with; tensors come on the meta device.

    Args:
        description: what `describe` wrote of each argument, by name.
        dtypes: as for `build`.
        where: the file that holds it, for messages.

    Raises:
        PpclError: a description is not one that `describe` writes; the line names the file and the argument.
    """
    check_numbers(description, where)
    example: dict[str, Any] = {}
    for name, value in description.items():
        with _named(where, name):
            example[name] = build(value, dtypes)
    found = {}
    for name in example:
        with _named(where, name):
            found[name] = _ones(description[name], name, example)
    return Examples(example, ones={name: sizes for name, sizes in found.items() if sizes is not None})


@contextmanager
def _named(where: str, argument: str) -> Iterator[None]:
    try:
        yield
    except PpclError as error:
        raise PpclError(f"{where}: example.{argument}: {error}") from None


def _ones(description: JsonValue, name: str, example: Mapping[str, Any]) -> Sizes | None:
    """Return the shape of the ones that a tensor stands for where it is missing; None where it does not."""
    tensor = description.get("tensor") if isinstance(description, dict) else None
    if not isinstance(tensor, dict) or "ones" not in tensor:
        return None
    given = tensor["ones"] if isinstance(tensor["ones"], list) else []
    sizes: list[Size] = []
    for size in given:
        if isinstance(size, list) and len(size) == 2 and isinstance(size[0], str) and type(size[1]) is int:
            sizes.append((size[0], size[1]))
        elif type(size) is int:
            sizes.append(size)
    without = {other: value for other, value in example.items() if other != name}
    if len(sizes) != len(given) or ones_shape(sizes, without) != tuple(example[name].shape):
        raise PpclError("the saved example of a call has ones of an unknown shape; save the model again")
    return sizes


def build(description: JsonValue, dtypes: Mapping[torch.dtype, torch.dtype] | None = None) -> Any:
    """Turn a description back into an argument; tensors come on the meta device.

    Args:
        description: what `describe` wrote.
        dtypes: dtypes to replace by others, for a model that is loaded in another dtype than it was saved in.

    Raises:
        PpclError: the description is not one that `describe` writes.
    """
    if not isinstance(description, dict) or len(description) != 1:
        raise PpclError("the saved example of a call is damaged; save the model again")
    (kind, content), *_ = description.items()
    if kind == "tensor" and isinstance(content, dict):
        name = str(content.get("dtype"))
        if name not in _DTYPES:
            raise PpclError(f"the saved example of a call has the unknown dtype {name!r}{near(name, _DTYPES)}")
        dtype = (dtypes or {}).get(_DTYPES[name], _DTYPES[name])
        shape = content.get("shape")
        sizes = [size for size in shape if type(size) is int and size >= 0] if isinstance(shape, list) else []
        if not isinstance(shape, list) or len(sizes) < len(shape) or math.prod(sizes) > MOST_ELEMENTS:
            raise PpclError("the saved example of a call has a tensor without a shape; save the model again")
        return torch.empty(sizes, dtype=dtype, device="meta")
    if kind in ("list", "tuple") and isinstance(content, list):
        items = [build(item, dtypes) for item in content]
        return tuple(items) if kind == "tuple" else items
    if kind == "dict" and isinstance(content, dict):
        return {key: build(item, dtypes) for key, item in content.items()}
    if kind == "pairs" and isinstance(content, list):
        pairs = [pair for pair in content if isinstance(pair, list) and len(pair) == 2]
        keys = [build(pair[0], dtypes) for pair in pairs]
        if len(pairs) == len(content) and all(isinstance(key, (bool, int, float, str)) for key in keys):
            return {key: build(pair[1], dtypes) for key, pair in zip(keys, pairs, strict=True)}
    if kind == "value" and not isinstance(content, (list, dict)):
        return content
    raise PpclError(f"the saved example of a call has an unknown entry {kind!r}; save the model again")
