"""Actual values of graph nodes: asked for only where an example without storage cannot answer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from ppcl_fx.ir.graphs import ancestors
from ppcl_fx.tracing.examples import map_tensors, resolved
from ppcl_fx.tracing.guards import is_guard


class UnknownValue(Exception):
    """A value cannot be known; `name` is the input or the weight that has no storage."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Values:
    """Computes what a node holds in the traced call, from the call's own inputs and the model's own weights.

    Examples live on the meta device and have shapes only. A few models read a mask or a list of lengths in Python;
    what they read is computed here, and nothing else. Whatever is decided by it is guarded like every decision.

    Args:
        model: the model itself, not its shadow.
        given: the inputs as the caller gave them.
    """

    def __init__(self, model: nn.Module, given: Mapping[str, Any]) -> None:
        self.model = model
        self.given = given
        self.used: set[str] = set()
        self._known: dict[Node, Any] = {}

    def of(self, node: Node) -> Any:
        """Return the value of a node.

        Raises:
            UnknownValue: it depends on an input or a weight on the meta device.
        """
        if node not in self._known:
            needed = ancestors([node], stop=self._known)
            for other in node.graph.nodes:
                if other in needed and other not in self._known and not is_guard(other):
                    self._known[other] = self._compute(other)
        return self._known[node]

    def stand_in(self, node: Node, shadow: nn.Module | None) -> Any:
        """Return a result of the node's operation that has the right shapes, and the right whole numbers.

        Tensors of numbers in floating point are taken as zeros, weights too, so that nothing large is computed;
        tensors of whole numbers and masks get their actual values.

        Args:
            node: the operation.
            shadow: for a ``call_module`` node, the module's copy without storage.
        """
        cpu = torch.device("cpu")
        args, kwargs = resolved(tuple(node.args), self._light, cpu), resolved(dict(node.kwargs), self._light, cpu)
        if shadow is not None:
            return _zeroed(shadow)(*args, **kwargs)
        return _function(node)(*args, **kwargs)

    def _light(self, node: Node) -> Any:
        value = node.meta["val"]
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        if any(not (tensor.is_floating_point() or tensor.is_complex()) for tensor in tensors):
            return map_tensors(self.of(node), torch.Tensor.cpu)
        return map_tensors(value, lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype))

    def _compute(self, node: Node) -> Any:
        if node.op == "placeholder":
            self.used.add(str(node.target))
            name = f"the input {node.target!r}"
            return map_tensors(self.given[str(node.target)], lambda tensor: _real(tensor, name))
        if node.op == "get_attr":
            return _real(node.meta["actual"], f"the weight {node.target!r}")
        args, kwargs = resolved(tuple(node.args), self.of), resolved(dict(node.kwargs), self.of)
        if node.op != "call_module":
            return _function(node)(*args, **kwargs)
        module = self.model.get_submodule(str(node.target))
        for name, weight in (*module.named_parameters(), *module.named_buffers()):
            _real(weight, f"the weight {node.target}.{name}")
        return module(*args, **kwargs)


def _function(node: Node) -> Callable[..., Any]:
    if node.op == "call_method":
        name = str(node.target)
        return lambda target, *args, **kwargs: getattr(target, name)(*args, **kwargs)
    assert callable(node.target)
    return node.target


def _real(tensor: torch.Tensor, name: str) -> torch.Tensor:
    if tensor.is_meta:
        raise UnknownValue(name)
    return tensor.detach().clone()


def _zeroed(shadow: nn.Module) -> nn.Module:
    """Return a copy of a module without storage that has some: all zeros."""
    module = copy.deepcopy(shadow).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.zero_()
    return module
