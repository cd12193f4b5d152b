"""Check a call against what a file takes, before it runs: names, types, fixed sizes, equal sizes, ranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ppcl_fx.errors import PpclError
from ppcl_fx.export.sidecar import Port
from ppcl_fx.export.tensorrt import Range

TYPES: dict[str, torch.dtype] = {
    "float": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "double": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}
"""ONNX's names of types, as manifests have them."""


def typed(port: Port, tensor: torch.Tensor) -> torch.Tensor:
    """Return an input in the type that a file takes: floats become other floats, nothing else is converted.

    Raises:
        PpclError: the type is unknown, or one is a float and the other is not.
    """
    wanted = TYPES.get(port.dtype)
    if wanted is None:
        raise PpclError(f"the input {port.name!r} is of the type {port.dtype!r}, which PyTorch has no name for")
    if tensor.dtype == wanted:
        return tensor
    if not (tensor.is_floating_point() and wanted.is_floating_point):
        raise PpclError(f"the input {port.name!r} is {tensor.dtype}, and the exported file takes {wanted}; convert it")
    return tensor.to(wanted)


def sizes_of(
    file: str, ports: Sequence[Port], feeds: Mapping[str, torch.Tensor], ranges: Mapping[str, Range], wider: str
) -> dict[str, int]:
    """Check the shapes of a call and return its open sizes by name.

    Args:
        file: the file's name, for messages.
        ports: its inputs.
        feeds: a tensor for each of them.
        ranges: what it takes for an open size; a size without one is open upwards from 1.
        wider: how to get a file that takes more, for the message.

    Raises:
        PpclError: a shape does not fit; the line names input, dimension, size and range.
    """
    sizes: dict[str, int] = {}
    first: dict[str, str] = {}
    for port in ports:
        shape = list(feeds[port.name].shape)
        if len(shape) != len(port.shape):
            raise PpclError(f"{file} takes {port.name} {_words(port)}, and this call has {shape}; {wider}")
        for dim, (size, wanted) in enumerate(zip(shape, port.shape, strict=True)):
            here = f"{port.name} {_words(port)}"
            if isinstance(wanted, int):
                if size != wanted:
                    raise PpclError(f"{file} takes {here}, and dimension {dim} of this call is {size}; {wider}")
                continue
            known = sizes.setdefault(wanted, size)
            if known != size:
                raise PpclError(
                    f"{file} takes {here}, and {wanted} is {size} here but {known} in {first[wanted]}; make them equal"
                )
            first.setdefault(wanted, port.name)
            low, high = (ranges[wanted].min, ranges[wanted].max) if wanted in ranges else (1, size)
            if not low <= size <= max(high, low):
                span = f"from {low} to {high}" if wanted in ranges else "1 or more"
                raise PpclError(f"{file} takes {span} for {wanted} of {port.name}, and this call has {size}; {wider}")
    return sizes


def sized(port: Port, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return a port's shape for the open sizes of a call."""
    return tuple(size if isinstance(size, int) else sizes[size] for size in port.shape)


def _words(port: Port) -> str:
    return f"[{', '.join(map(str, port.shape))}]"
