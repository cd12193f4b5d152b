"""Results on the meta device, by what they were computed from: look-alike blocks compute the same shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ppcl_fx.export.onnx.segments import described

_Form = tuple[torch.Size, tuple[int, ...], torch.dtype]

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)


class MetaResults:
    """Shapes, strides and types of results, by the function or module and its arguments.

    A tensor on the meta device has no values, so these decide the result. Calls with other arguments, a tensor with
    values among them, have no key and are not kept.
    """

    def __init__(self) -> None:
        self._forms: dict[Any, _Form | tuple[_Form, ...]] = {}
        self._described: dict[int, tuple[nn.Module, str]] = {}  # with the module, so that its id stays its own

    def key(self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what decides the result of a call; None where it cannot be told."""
        try:
            return (self._target(target), _frozen(tuple(args)), _frozen(dict(kwargs)))
        except _UnknownError:
            return None

    def get(self, key: Any) -> Any:
        """Return the result kept for a key, as new tensors; None if there is none."""
        forms = self._forms.get(key) if key is not None else None
        if forms is None:
            return None
        return _tensor(forms) if isinstance(forms[0], torch.Size) else tuple(_tensor(form) for form in forms)

    def add(self, key: Any, value: Any) -> None:
        """Keep a result: a tensor on the meta device, or a tuple of them; others are not kept."""
        if key is None:
            return
        if _on_meta(value):
            self._forms[key] = _form(value)
        elif type(value) is tuple and value and all(_on_meta(item) for item in value):
            self._forms[key] = tuple(_form(item) for item in value)

    def _target(self, target: Callable[..., Any] | nn.Module) -> Any:
        if not isinstance(target, nn.Module):
            return target
        if id(target) not in self._described:
            self._described[id(target)] = (target, described(target))
        return self._described[id(target)][1]


class _UnknownError(Exception):
    """An argument whose influence on the result is not known."""


def _frozen(value: Any) -> Any:
    """Return something that can be compared and hashed; equal ones give equal results."""
    if _on_meta(value):
        return _form(value)
    if isinstance(value, _PLAIN):
        return (type(value), value)
    if isinstance(value, (list, tuple)):
        return (type(value), *(_frozen(item) for item in value))
    if isinstance(value, dict):
        return (dict, *((name, _frozen(item)) for name, item in value.items()))
    if isinstance(value, slice):
        return (slice, _frozen((value.start, value.stop, value.step)))
    if value is Ellipsis:
        return Ellipsis
    raise _UnknownError


def _on_meta(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


def _form(tensor: torch.Tensor) -> _Form:
    return (tensor.shape, tensor.stride(), tensor.dtype)


def _tensor(form: _Form) -> torch.Tensor:
    size, stride, dtype = form
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")
