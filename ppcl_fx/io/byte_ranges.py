"""Where in a safetensors file the bytes of each tensor are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ppcl_fx.errors import PpclError
from ppcl_fx.io.reading import open_regular, parse_json
from ppcl_fx.io.shards import AGAIN, DTYPES

LONGEST_HEADER = 100 * 10**6
"""Bytes; the limit of the safetensors library."""


@dataclass(frozen=True)
class ByteRange:
    """The bytes of one tensor, row by row, little-endian.

    Attributes:
        file: the file.
        offset: the first byte, from the start of the file.
        dtype: of the elements.
        shape: of the tensor.
    """

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def length(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def byte_ranges(path: Path) -> dict[str, ByteRange]:
    """Read the header of a safetensors file: eight bytes of length, then JSON, then the data.

    Raises:
        PpclError: the file is missing or truncated, or its header says what cannot be.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, LONGEST_HEADER):
                raise ValueError("its header is longer than the file")
            header = parse_json(file.read(length))
        begin = 8 + length
        return {
            name: _range(path, entry, begin, size) for name, entry in header.items() if name != "__metadata__"
        }
    except OSError as error:
        raise PpclError(f"{path}: cannot be read ({error.strerror or error}); {AGAIN}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PpclError(f"{path}: truncated or not a safetensors file ({error}); {AGAIN}") from None


def _range(path: Path, entry: dict[str, Any], begin: int, size: int) -> ByteRange:
    first, last = entry["data_offsets"]
    found = ByteRange(path, begin + first, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    if first < 0 or last - first != found.length or begin + last > size:
        raise ValueError("a tensor lies beyond its end")
    return found
