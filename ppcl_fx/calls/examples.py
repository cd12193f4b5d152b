"""The shapes of a call as validated JSON, so that a saved model can be traced again without its calls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import JsonValue, StrictInt, StrictStr, TypeAdapter, ValidationError

from ppcl_fx.calls.kinds import Examples, Sizes, ones_shape
from ppcl_fx.errors import PpclError, near
from ppcl_fx.io.configurations import check_numbers
from ppcl_fx.io.shards import DTYPES

MOST_ELEMENTS = 2**34
"""Elements that an argument of a call may have: a hundred times those of a film's latents."""
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
_SIZES = TypeAdapter(list[StrictInt | tuple[StrictStr, StrictInt]])


def describe(value: Any, ones: Sizes | None = None) -> JsonValue:
    """Describe a call's argument: tensors by shape and dtype, everything else as it is; PpclError if JSON cannot.

    `ones` is, for a tensor that stands for ones where it is missing, their shape (`ppcl_fx.calls.kinds.Examples`).
    """
    match value:
        case torch.Tensor():
            form: dict[str, Any] = {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
            return {"tensor": form if ones is None else {**form, "ones": _SIZES.dump_python(list(ones), mode="json")}}
        case list() | tuple():
            return {"tuple" if isinstance(value, tuple) else "list": [describe(item) for item in value]}
        case Mapping() if all(isinstance(key, str) for key in value):
            return {"dict": {key: describe(item) for key, item in value.items()}}
        case Mapping():
            return {"pairs": [[describe(key), describe(item)] for key, item in value.items()]}
        case None | bool() | int() | float() | str():
            return {"value": value}
    raise PpclError(f"an argument of type {type(value).__name__} cannot be saved; record calls with plain values")


def build_call(
    description: Mapping[str, JsonValue], dtypes: Mapping[torch.dtype, torch.dtype] | None = None, where: str = "model"
) -> Examples:
    """Turn what `describe` wrote of a call's arguments, by name, back into a call to trace with; as `build`.

    The PpclError names the file, `where`, and the argument.
    """
    check_numbers(description, where)
    example: dict[str, Any] = {}
    ones, name = {}, ""
    try:
        for name, value in description.items():
            example[name] = build(value, dtypes)
        for name, value in description.items():
            match value:
                case {"tensor": {"ones": sizes}}:
                    ones[name] = _ones(sizes, name, example)
    except PpclError as error:
        raise PpclError(f"{where}: example.{name}: {error}") from None
    return Examples(example, ones=ones)


def _ones(given: JsonValue, name: str, example: Mapping[str, Any]) -> Sizes:
    """Return the shape of the ones that a tensor stands for where it is missing."""
    try:
        sizes = _SIZES.validate_python(given)
    except ValidationError:
        sizes = []
    if ones_shape(sizes, {**example, name: None}) != tuple(example[name].shape):
        raise PpclError("the saved example of a call has ones of an unknown shape; save the model again")
    return sizes


def floats_as(kwargs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return a call with its floating-point tensors in another type, as a pipeline of that type passes them.

    Numbers and lists of numbers never become narrower: a pipeline may pass timesteps in float32 beside bfloat16 latents
    (SD3's does), and bfloat16 makes 988 of 987.65. A model that wants them narrower converts them itself. The tensors
    of a list are samples, or what several layers gave; those of a tuple are position tables, which stay as they are.
    """

    def cast(value: Any) -> Any:
        if isinstance(value, list):
            return [cast(item) for item in value]
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        return value.to(dtype if value.ndim > 1 else torch.promote_types(value.dtype, dtype))

    return {name: cast(value) for name, value in kwargs.items()}


def build(description: JsonValue, dtypes: Mapping[torch.dtype, torch.dtype] | None = None) -> Any:
    """Turn what `describe` wrote back into an argument, PpclError for anything else; tensors come on the meta device.

    `dtypes` are replaced by others, for a model that is loaded in another dtype than it was saved in.
    """
    if not isinstance(description, dict) or len(description) != 1:
        raise PpclError("the saved example of a call is damaged; save the model again")
    match description:
        case {"tensor": dict(form)}:
            return _tensor(form, dtypes or {})
        case {"list": [*items]}:
            return [build(item, dtypes) for item in items]
        case {"tuple": [*items]}:
            return tuple(build(item, dtypes) for item in items)
        case {"dict": dict(entries)}:
            return {key: build(item, dtypes) for key, item in entries.items()}
        case {"pairs": [*pairs]} if all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            found = [[build(part, dtypes) for part in pair] for pair in pairs if isinstance(pair, list)]
            if all(isinstance(key, (bool, int, float, str)) for key, _ in found):
                return dict(found)
        case {"value": None | bool() | int() | float() | str() as value}:
            return value
    kind = next(iter(description))
    raise PpclError(f"the saved example of a call has an unknown entry {kind!r}; save the model again")


def _tensor(form: Mapping[str, JsonValue], dtypes: Mapping[torch.dtype, torch.dtype]) -> torch.Tensor:
    name, shape = str(form.get("dtype")), form.get("shape")
    if name not in _DTYPES:
        raise PpclError(f"the saved example of a call has the unknown dtype {name!r}{near(name, _DTYPES)}")
    sizes = [size for size in shape if type(size) is int and size >= 0] if isinstance(shape, list) else []
    if not isinstance(shape, list) or len(sizes) < len(shape) or math.prod(sizes) > MOST_ELEMENTS:
        raise PpclError("the saved example of a call has a tensor without a shape; save the model again")
    return torch.empty(sizes, dtype=dtypes.get(_DTYPES[name], _DTYPES[name]), device="meta")
