"""Safetensors files larger than memory: the header from shapes alone, then one tensor after the other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ppcl_fx.errors import PpclError
from ppcl_fx.io.fingerprint import tensor_digest
from ppcl_fx.io.shards import DIGESTS, DTYPES

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
    *,
    metadata: Mapping[str, str] | None = None,
    digests: bool = False,
) -> None:
    """Write tensors to a safetensors file in a folder that is not final yet, holding one at a time.

    Args:
        path: the file.
        forms: dtype and shape of each tensor by name.
        read: gives each tensor; a memory-mapped one goes from file to file.
        tick: told the number of bytes after each tensor.
        metadata: what the header says beside the tensors.
        digests: let the header hold each tensor's digest (`ppcl_fx.io.shards.Shards.digests`) too.
    """
    header: dict[str, object] = {}
    at = 0
    # Larger items first, so that each tensor begins at a multiple of its item's size.
    names = sorted(forms, key=lambda name: (-forms[name][0].itemsize, name))
    for name in names:
        size = form_bytes({name: forms[name]})
        dtype, shape = forms[name]
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    found = dict.fromkeys(names, "0" * 64) if digests else {}
    begin = _header(header, metadata or {}, found)
    try:
        with path.open("wb") as file:
            file.write(begin)
            for name in names:
                tensor = read(name).detach().cpu().contiguous()
                assert (tensor.dtype, tuple(tensor.shape)) == forms[name], name
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
                if digests:
                    found[name] = tensor_digest(tensor)
                tick(tensor.nbytes)
            if digests:
                file.seek(0)
                file.write(_header(header, metadata or {}, found))  # as long as before
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = error.strerror or error
        raise PpclError(f"{path.name}: cannot be written ({reason}); make room, or choose another place") from error


def _header(entries: Mapping[str, object], metadata: Mapping[str, str], digests: Mapping[str, str]) -> bytes:
    said = {**metadata, **({DIGESTS: json.dumps(digests, sort_keys=True)} if digests else {})}
    whole = {"__metadata__": dict(sorted(said.items())), **entries} if said else entries
    text = json.dumps(whole, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
