"""Check a call against what a file takes, before it runs: names, types, fixed sizes, equal sizes, ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ppcl_fx.errors import PpclError
from ppcl_fx.export.store.manifest import Port
from ppcl_fx.export.tensorrt.profiles import Range

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


def sizes_of(file: str, ports: Sequence[Port], feeds: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Check the shapes of a call and return its open sizes by name.

    Args:
        file: the file's name, for messages.
        ports: its inputs.
        feeds: a tensor for each of them.

    Raises:
        PpclError: a shape does not fit; the line names input, dimension and size.
    """
    sizes: dict[str, int] = {}
    first: dict[str, str] = {}
    for port in ports:
        shape, here = list(feeds[port.name].shape), f"{file} takes {port.name} [{', '.join(map(str, port.shape))}]"
        if len(shape) != len(port.shape):
            raise PpclError(f"{here}, and this call has {shape}; the other sizes are part of the model")
        for dim, (size, wanted) in enumerate(zip(shape, port.shape, strict=True)):
            if isinstance(wanted, int):
                if size != wanted:
                    raise PpclError(f"{here}, and dimension {dim} of this call is {size}; it is part of the model")
                continue
            known = sizes.setdefault(wanted, size)
            first.setdefault(wanted, port.name)
            if known != size:
                raise PpclError(f"{here}, and {wanted} is {size} here but {known} in {first[wanted]}; make them equal")
            if size < 1:
                raise PpclError(f"{here}, and {wanted} of this call is {size}; give at least one")
    return sizes


def profile_of(file: str, sizes: Mapping[str, int], profiles: Sequence[Mapping[str, Range]], wider: str) -> int:
    """Return the tightest profile of an engine that takes a call, by its index; 0 for a file without profiles.

    Kernels are tuned for a profile, so of two that fit the one with fewer other sizes is better; of equals the first.

    Args:
        file: the file's name, for messages.
        sizes: the open sizes of the call.
        profiles: the sizes that each profile takes; one that it does not name is open.
        wider: how to get a file that takes more, for the message.

    Raises:
        PpclError: none does; the line names the sizes and the ranges.
    """
    outside = [[name for name, size in sizes.items() if _out(size, profile, name)] for profile in profiles]
    fitting = [index for index, faults in enumerate(outside) if not faults]
    if fitting or not profiles:
        return min(fitting, key=lambda index: _room(profiles[index], sizes), default=0)
    names, nearest = min(zip(outside, profiles, strict=True), key=lambda pair: len(pair[0]))
    faults = [f"{name} {sizes[name]} (it takes {nearest[name].min} to {nearest[name].max})" for name in names]
    raise PpclError(f"{file} is not for {', '.join(faults)}; {wider}")


def _out(size: int, profile: Mapping[str, Range], name: str) -> bool:
    return name in profile and not profile[name].min <= size <= profile[name].max


def _room(profile: Mapping[str, Range], sizes: Mapping[str, int]) -> int:
    """Return how many kinds of call a profile takes."""
    return math.prod(profile[name].max - profile[name].min + 1 for name in sizes if name in profile)


def sized(port: Port, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return a port's shape for the open sizes of a call."""
    return tuple(size if isinstance(size, int) else sizes[size] for size in port.shape)
