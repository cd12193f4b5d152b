"""Example values of graph arguments, and the memory that spares computing the same example twice."""

from __future__ import annotations

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


def fresh(value: Any) -> Any:
    """Return a remembered example as an object of its own, or the value itself where it cannot change."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size) and not hasattr(value, "_fields"):
        return type(value)(fresh(item) for item in value)
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
