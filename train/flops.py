"""Floating-point operations of a step: those of matrix products, convolutions and attention, by PyTorch's formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_CPU = "_scaled_dot_product_flash_attention_for_cpu"


class Counter(TorchDispatchMode):
    """Counts what runs inside; every operation runs as it would outside, to the bit.

    PyTorch's own counter also follows modules, which a backward pass in the middle of a graph confuses; and it does
    not know the CPU's attention.

    Attributes:
        total: Operations so far; a multiplication with an addition is two.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in flop_registry:
            self.total += int(flop_registry[packet](*args, **kwargs, out_val=out))
        elif packet.__name__ == _CPU:
            self.total += sdpa_flop_count(*_shapes(args[:3]))
        elif packet.__name__ == f"{_CPU}_backward":
            # The gradient of the output comes first.
            self.total += sdpa_backward_flop_count(*_shapes(args[:4]))
        return out


def _shapes(tensors: tuple[Any, ...]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]
