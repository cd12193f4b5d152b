"""A shadow of a model on the meta device: same modules, no storage. The tracer runs it instead of the model."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import nn


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=False)
    return empty


def to_meta(value: Any) -> Any:
    """Move every tensor in nested lists, tuples and dicts to the meta device; leave everything else as it is."""
    if isinstance(value, torch.Tensor):
        return _meta(value.detach())
    if isinstance(value, tuple):
        return tuple(to_meta(item) for item in value)
    if isinstance(value, list):
        return [to_meta(item) for item in value]
    if isinstance(value, dict):
        return {key: to_meta(item) for key, item in value.items()}
    return value


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
