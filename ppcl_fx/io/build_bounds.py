"""Room: how large a model may become while it is built from a configuration that nobody can trust."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ppcl_fx.errors import PpclError

SMALL = 2**25
"""Elements that a tensor may have whatever the weights are: tables of positions have the same size for any model."""
SPARE_TENSORS, SPARE_ELEMENTS = 256, 2**16
OPERATIONS = 10**6
"""Operations on tensors that building, or tracing, may take beyond some thousand a stored tensor."""


@dataclass(frozen=True)
class Room:
    """Bounds of what is built: parameters by number and by elements; elements of a tensor not on the meta device."""

    tensors: int
    elements: int
    largest: int = SMALL

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], times: int = 2) -> Room:
        """Return the room of a model that may be some times as large as what is stored: tied tensors are there once."""
        sizes = [times * torch.Size(shape).numel() for shape in shapes.values()]
        return cls(times * len(sizes) + SPARE_TENSORS, sum(sizes) + SPARE_ELEMENTS, max([SMALL, *sizes]))

    @contextmanager
    def kept(self, where: str) -> Iterator[None]:
        """Stop, by a PpclError that begins with `where`, a block that builds more than there is room for."""
        tensors = elements = 0

        def count(param: nn.Parameter) -> nn.Parameter:
            nonlocal tensors, elements
            tensors, elements = tensors + 1, elements + param.numel()
            if tensors > self.tensors or elements > self.elements:
                most = f"{tensors - 1:,} tensors and {elements - param.numel():,} parameters"
                why = f"asks for a model of more than {most}, and the stored weights are fewer"
                raise PpclError(f"{where}: {why}; mend its numbers, or copy the weights again")
            return param

        with on_register(count), _Bounded(self, where):
            yield


@contextmanager
def on_register(change: Callable[[nn.Parameter], nn.Parameter]) -> Iterator[None]:
    """Let every module of the block register what `change` returns for a parameter, in its place."""

    def changed(module: nn.Module, name: str, param: nn.Parameter) -> Any:
        return change(param)

    with register_module_parameter_registration_hook(changed):
        yield


class _Bounded(TorchDispatchMode):
    """Asks the meta device how large a result will be, before any memory is taken for it."""

    def __init__(self, room: Room, where: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.room, self.where = room, where
        self.left = OPERATIONS + 1000 * room.tensors

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            raise PpclError(f"{self.where}: building this does not come to an end; mend its numbers")
        size = _size(func, args, kwargs or {})
        if size > self.room.largest:
            why = f"asks for a tensor of {size:,} elements, more than such a model can need"
            raise PpclError(f"{self.where}: {why}; mend its numbers")
        return func(*args, **(kwargs or {}))


def _size(func: Any, args: Any, kwargs: Mapping[str, Any]) -> int:
    """Return the elements of an operation's result, as far as it takes memory of its own; 0 where that is not known."""
    tensors = [value for value in tree_leaves([args, kwargs]) if isinstance(value, torch.Tensor)]
    if func._schema.is_mutable or func.is_view or any(tensor.is_meta for tensor in tensors):
        return 0
    given, named = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, dict(kwargs)))
    if any(argument.name == "device" for argument in func._schema.arguments):
        named["device"] = torch.device("meta")
    elif not tensors:
        return 0
    try:
        made = func(*given, **named)
    except (RuntimeError, TypeError, ValueError):
        return 0  # no form for the meta device, or wrong arguments: the operation itself will say so
    return made.numel() if isinstance(made, torch.Tensor) else 0
