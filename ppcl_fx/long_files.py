"""Safetensors files larger than memory: the header from shapes alone, then one tensor after the other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ppcl_fx.errors import PpclError
from ppcl_fx.shards import DTYPES

Form = tuple[torch.dtype, tuple[int, ...]]
"""A tensor's dtype and shape."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def form_bytes(forms: Mapping[str, Form]) -> int:
    """Return the bytes that tensors of these forms take."""
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in forms.values())


def write_long(
    path: Path,
    forms: Mapping[str, Form],
    read: Callable[[str], Tensor],
    tick: Callable[[int], None] = lambda n: None,
) -> None:
    """Write tensors to a safetensors file in a folder that is not final yet, holding one at a time.

    Args:
        path: the file.
        forms: dtype and shape of each tensor by name.
        read: gives each tensor; a memory-mapped one goes from file to file.
        tick: told the number of bytes after each tensor.

    Raises:
        PpclError: the disk is full, or the place cannot be written.
    """
    header: dict[str, object] = {}
    at = 0
    # Larger items first, so that each tensor begins at a multiple of its item's size.
    names = sorted(forms, key=lambda name: (-forms[name][0].itemsize, name))
    for name in names:
        size = form_bytes({name: forms[name]})
        dtype, shape = forms[name]
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                tensor = read(name).detach()
                assert (tensor.dtype, tuple(tensor.shape)) == forms[name], name
                file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                tick(tensor.nbytes)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = error.strerror or str(error)
        raise PpclError(
            f"{path.name}: cannot be written ({reason}); make room, or choose another place"
        ) from error
