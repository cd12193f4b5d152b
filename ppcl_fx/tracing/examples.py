"""Example values on the meta device: of graph arguments and of a model, and what spares computing one twice."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn
from torch.fx import Node

META = torch.device("meta")


def examples(argument: Any) -> Any:
    """Replace nodes by their examples, in plain (mutable) containers as the model itself would get them.

    Devices become the meta device: example tensors have no storage, whatever device the model asks for.
    """
    return resolved(argument, lambda node: node.meta["val"], META)


def resolved(argument: Any, read: Callable[[Node], Any], device: torch.device | None = None) -> Any:
    """Replace nodes in a graph argument by values, in plain (mutable) containers.

    Args:
        argument: an argument of a node, containers included.
        read: gives the value of a node.
        device: takes the place of every device, where given.
    """
    if isinstance(argument, Node):
        argument = read(argument)
    if isinstance(argument, torch.device):
        return device or argument
    if isinstance(argument, tuple) and not isinstance(argument, torch.Size):
        parts = [resolved(item, read, device) for item in argument]
        if hasattr(argument, "n_sequence_fields"):
            return type(argument)(parts)  # what `max(dim=...)` and the like return: its fields have names
        return type(argument)(*parts) if hasattr(argument, "_fields") else tuple(parts)
    if isinstance(argument, list):
        return [resolved(item, read, device) for item in argument]
    if isinstance(argument, dict):
        return {key: resolved(item, read, device) for key, item in argument.items()}
    if isinstance(argument, slice):
        return slice(*(resolved(item, read, device) for item in (argument.start, argument.stop, argument.step)))
    return argument


def signature(target: Any, args: Any, kwargs: Any) -> Hashable | None:
    """Return what the example of an operation depends on, or ``None`` where that cannot be told.

    Args:
        target: a function, a method's name, or a module.
        args: positional examples.
        kwargs: examples by name.
    """
    if isinstance(target, str) and target.endswith("_"):
        return None  # works in place: its effect on the argument is part of the example
    try:
        head = _module_key(target) if isinstance(target, nn.Module) else target
        return (head, _key(args), _key(kwargs))
    except _Unknown:
        return None


def map_tensors(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """Change every tensor in nested lists, tuples and dicts; everything else stays as it is."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        items = [map_tensors(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    return value


class _Unknown(Exception):
    """A value of a kind whose equality says nothing about what is computed from it."""


def _key(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.dtype, value.stride())
    if isinstance(value, (tuple, list)):
        return (type(value), tuple(_key(item) for item in value))
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    if isinstance(value, slice):
        return (slice, value.start, value.stop, value.step)
    if value is None or value is ... or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return (type(value), value)
    raise _Unknown


def _module_key(module: nn.Module) -> Hashable:
    parts: list[Hashable] = []
    for path, child in module.named_modules():
        own = [(n, v) for n, v in vars(child).items() if v is None or isinstance(v, (bool, int, float, str))]
        tensors = [(n, _key(t)) for n, t in (*child._parameters.items(), *child._buffers.items()) if t is not None]
        # Any other object (an attention processor) stands for itself by its type.
        others = [(n, type(v)) for n, v in vars(child).items() if not n.startswith("_")]
        parts.append((path, type(child), tuple(own), tuple(tensors), tuple(others)))
    return tuple(parts)


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def to_meta(value: Any) -> Any:
    """Move every tensor in nested lists, tuples and dicts to the meta device; leave everything else as it is."""
    return map_tensors(value, lambda tensor: _meta(tensor.detach()))


def shadow(model: nn.Module) -> tuple[nn.Module, dict[int, torch.Tensor]]:
    """Copy a model with every tensor on the meta device.

    The model itself is never run while tracing, so nothing can leak into it, and a 20 B model costs nothing.

    Returns:
        The copy, and for each of its plain tensor attributes (neither parameter nor buffer, by `id` of the copy)
        the tensor of the model that it stands for.
    """
    memo: dict[int, Any] = {}
    plain: dict[int, torch.Tensor] = {}
    modules = list(model.modules())
    for module in modules:
        memo[id(module)] = module.__class__.__new__(module.__class__)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = _meta(tensor)
        for tensor in vars(module).values():
            if isinstance(tensor, torch.Tensor) and id(tensor) not in memo:
                memo[id(tensor)] = _meta(tensor)
                plain[id(memo[id(tensor)])] = tensor
    for module in modules:
        # Most attributes of a module are numbers and empty hook tables; a general deep copy of them is slow.
        memo[id(module)].__dict__.update({name: _copied(value, memo) for name, value in vars(module).items()})
    return memo[id(model)], plain


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return value
    if type(value) in (dict, OrderedDict) and all(item is None or id(item) in memo for item in value.values()):
        return type(value)((key, memo.get(id(item))) for key, item in value.items())
    return copy.deepcopy(value, memo)
