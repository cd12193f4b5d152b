"""Proxies that carry an example value, so that control flow in the model can be followed."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node, Proxy

if TYPE_CHECKING:
    from ppcl_fx.tracing.tracer import ExampleTracer


def set_item(target: Any, key: Any, value: Any) -> Any:
    """Write ``target[key] = value`` in place and return `target`: item assignment as a node with a result."""
    target[key] = value
    return target


torch.fx.node.has_side_effect(set_item)


class ExampleProxy(Proxy):
    """A symbolic value with an example beside it (``node.meta["val"]``, tensors on the meta device).

    Everything computed from it is recorded. Only where Python itself needs an answer (a branch, a length, an
    iteration, an index) the example decides, and the tracer leaves a guard in the graph.
    """

    node: Node
    tracer: ExampleTracer

    def __init__(self, node: Node, tracer: ExampleTracer) -> None:
        super().__init__(node, tracer)

    @property
    def example(self) -> Any:
        """The example value of this node."""
        return self.node.meta["val"]

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance(x, torch.Tensor) and the like in model code must see the concrete type.
        return type(self.node.meta["val"])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self.example, name)
        if callable(value) and not isinstance(value, (torch.dtype, torch.device)):
            return _Method(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __array_ufunc__(self, function: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        """Record numpy's functions too: models compute with lengths by ``np.ceil`` and the like."""
        if method != "__call__":
            return NotImplemented
        return self.tracer.create_proxy("call_function", function, args, kwargs)

    def __bool__(self) -> bool:
        return bool(self.tracer.decide(self, bool))

    def __index__(self) -> int:
        return int(self.tracer.decide(self, operator.index))

    def __int__(self) -> int:
        return int(self.tracer.decide(self, int))

    def __float__(self) -> float:
        return float(self.tracer.decide(self, float))

    def __len__(self) -> int:
        return self.tracer.decide_length(self)

    def __contains__(self, item: Any) -> bool:
        return bool(self.tracer.create_proxy("call_function", operator.contains, (self, item), {}))

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.example, dict):
            return iter(self.keys())
        # Not a generator: the guard must stand before the first item is used.
        length = self.tracer.decide_length(self)
        return iter([self.tracer.create_proxy("call_function", operator.getitem, (self, i), {}) for i in range(length)])

    def keys(self) -> Any:
        """The keys of a dict-valued proxy, decided by the example and guarded."""
        names = list(self.example.keys())
        held = self.tracer.create_proxy("call_function", sorted, (self,), {})
        self.tracer.guard(held.node, sorted(names), f"the keys of {self.node.name}")
        return names

    def __setitem__(self, key: Any, value: Any) -> None:
        written = self.tracer.create_proxy("call_function", set_item, (self, key, value), {})
        # Later uses of this proxy must come after the write.
        self.node = written.node

    def __hash__(self) -> int:
        # A set of lengths must find equal ones equal; what it finds is guarded. Tensors hash by identity.
        if isinstance(self.example, (bool, int, float, str)):
            return hash(self.tracer.decide(self, type(self.example)))
        return id(self)


class _Method:
    """``proxy.name`` before it is called: becomes one ``call_method`` node."""

    def __init__(self, proxy: ExampleProxy, name: str) -> None:
        self.proxy = proxy
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.proxy.tracer.create_proxy("call_method", self.name, (self.proxy, *args), kwargs)
