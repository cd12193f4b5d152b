"""A few bytes of a weight file, enough to see that it was trained again: quick where a hash of all of it is not."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ppcl_fx.errors import PpclError
from ppcl_fx.export.byte_ranges import byte_ranges
from ppcl_fx.reading import open_regular

SPOT = 256
"""Bytes read at the beginning, in the middle and at the end of each tensor."""

PIECES = 256
"""Into how many pieces a file that does not name its tensors is cut."""


def sample_of(path: Path) -> str:
    """Return a digest of a file's size, of where its tensors lie, and of some bytes of each of them.

    A step of training moves every value of a weight, so the digest is another one then. It does not see a single
    changed byte: that takes a hash.

    Raises:
        PpclError: the file cannot be read, or is a safetensors file whose header is damaged.
    """
    try:
        return _digest(path)
    except OSError as error:
        raise PpclError(
            f"{path}: cannot be read ({error.strerror or error}); check the path and its permissions"
        ) from error


def _digest(path: Path) -> str:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
    if path.suffix == ".safetensors":
        places = sorted((part.offset, part.length) for part in byte_ranges(path).values())
    else:
        step = max(1, -(-size // PIECES))
        places = [(first, min(step, size - first)) for first in range(0, size, step)]
    found = hashlib.sha256(f"{size} {places}".encode())
    with open_regular(path) as file:
        for first, length in places:
            last = first + length
            for at in sorted({first, first + length // 2, max(first, last - SPOT)}):
                file.seek(at)
                found.update(file.read(min(SPOT, last - at)))
    return found.hexdigest()
