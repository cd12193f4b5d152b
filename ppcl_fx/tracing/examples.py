"""Example values on the meta device, of graph arguments and of a model, what spares computing one twice, and the actual
values of nodes, which are asked for only where an example without storage cannot answer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from ppcl_fx.ir.graphs import ancestors
from ppcl_fx.tracing.guards import is_guard

META = torch.device("meta")


def examples(argument: Any) -> Any:
    """Replace nodes by their examples, and devices by the meta device: example tensors have no storage."""
    return resolved(argument, lambda node: node.meta["val"], META)


def resolved(argument: Any, read: Callable[[Node], Any], device: torch.device | None = None) -> Any:
    """Replace nodes in a graph argument by what `read` gives, in plain (mutable) containers as a model would get them.

    `device` takes the place of every device, where given.
    """

    def inside(item: Any) -> Any:
        return resolved(item, read, device)

    if isinstance(argument, Node):
        argument = read(argument)
    if isinstance(argument, torch.device):
        return device or argument
    if isinstance(argument, tuple) and not isinstance(argument, torch.Size):
        parts = [inside(item) for item in argument]
        if hasattr(argument, "n_sequence_fields"):
            return type(argument)(parts)  # what `max(dim=...)` and the like return: its fields have names
        return type(argument)(*parts) if hasattr(argument, "_fields") else tuple(parts)
    if isinstance(argument, list):
        return [inside(item) for item in argument]
    if isinstance(argument, dict):
        return {key: inside(item) for key, item in argument.items()}
    if isinstance(argument, slice):
        return slice(inside(argument.start), inside(argument.stop), inside(argument.step))
    return argument


def signature(target: Any, args: Any, kwargs: Any) -> Hashable | None:
    """Return what the example of an operation (a function, a method's name, a module) depends on, or ``None`` where
    that cannot be told.
    """
    if isinstance(target, str) and target.endswith("_"):
        return None  # works in place: its effect on the argument is part of the example
    try:
        head = _module_key(target) if isinstance(target, nn.Module) else target
        return (head, _key(args), _key(kwargs))
    except _Unknown:
        return None


def map_tensors(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """Change every tensor in nested lists, tuples and dicts; everything else stays as it is, a `torch.Size` too."""
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
    """Move every tensor in nested lists, tuples and dicts to the meta device."""
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
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = _meta(tensor)
        for tensor in vars(module).values():
            if isinstance(tensor, torch.Tensor) and id(tensor) not in memo:
                memo[id(tensor)] = _meta(tensor)
                plain[id(memo[id(tensor)])] = tensor
    return copy.deepcopy(model, memo), plain


class UnknownValue(Exception):
    """A value cannot be known; `name` is the input or the weight that has no storage."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Values:
    """Computes what a node holds in the traced call, from the call's own inputs and the model's own weights.

    Examples live on the meta device and have shapes only. A few models read a mask or a list of lengths in Python;
    what they read is computed here, and nothing else. Whatever is decided by it is guarded like every decision.
    """

    def __init__(self, model: nn.Module, given: Mapping[str, Any]) -> None:
        self.model = model
        self.given = given
        self._known: dict[Node, Any] = {}

    def of(self, node: Node) -> Any:
        """Return the value of a node; UnknownValue where it depends on an input or a weight on the meta device."""
        if node not in self._known:
            needed = ancestors([node], stop=self._known)
            for other in node.graph.nodes:
                if other in needed and other not in self._known and not is_guard(other):
                    self._known[other] = self._compute(other)
        return self._known[node]

    def stand_in(self, node: Node, shadow: nn.Module | None) -> Any:
        """Return a result of the node's operation that has the right shapes, and the right whole numbers.

        Tensors of numbers in floating point are taken as zeros, weights too (of the module's `shadow`, which has no
        storage), so that nothing large is computed; tensors of whole numbers and masks get their actual values.
        """
        cpu = torch.device("cpu")
        args, kwargs = resolved(tuple(node.args), self._light, cpu), resolved(dict(node.kwargs), self._light, cpu)
        if shadow is None:
            return function_of(node)(*args, **kwargs)
        module = copy.deepcopy(shadow).to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.zero_()
        return module(*args, **kwargs)

    def _light(self, node: Node) -> Any:
        value = node.meta["val"]
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        if any(not (tensor.is_floating_point() or tensor.is_complex()) for tensor in tensors):
            return map_tensors(self.of(node), torch.Tensor.cpu)
        return map_tensors(value, lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype))

    def _compute(self, node: Node) -> Any:
        if node.op == "placeholder":
            name = f"the input {node.target!r}"
            return map_tensors(self.given[str(node.target)], lambda tensor: _real(tensor, name))
        if node.op == "get_attr":
            return _real(node.meta["actual"], f"the weight {node.target!r}")
        args, kwargs = resolved(tuple(node.args), self.of), resolved(dict(node.kwargs), self.of)
        if node.op != "call_module":
            return function_of(node)(*args, **kwargs)
        module = self.model.get_submodule(str(node.target))
        for name, weight in (*module.named_parameters(), *module.named_buffers()):
            _real(weight, f"the weight {node.target}.{name}")
        return module(*args, **kwargs)


def function_of(node: Node) -> Callable[..., Any]:
    """Return what a ``call_method`` or ``call_function`` node calls."""
    if node.op == "call_method":
        name = str(node.target)
        return lambda target, *args, **kwargs: getattr(target, name)(*args, **kwargs)
    assert callable(node.target)
    return node.target


def _real(tensor: torch.Tensor, name: str) -> torch.Tensor:
    if tensor.is_meta:
        raise UnknownValue(name)
    return tensor.detach().clone()
