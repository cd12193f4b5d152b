"""Memory in bytes: what a person writes, what this process holds, what a machine has."""

from __future__ import annotations

import re
from pathlib import Path

from ppcl_fx.errors import PpclError

UNITS = {
    "": 1,
    "B": 1,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
MOST = 2**50
"""Bytes that a size may be."""


def parse_size(option: str, text: str) -> int:
    """Return the bytes of a size such as ``12GiB``, ``900 MB`` or a plain number.

    Raises:
        PpclError: it is no size, or not above zero. The line begins with `option`.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = (
        {"K": "KIB", "M": "MIB", "G": "GIB", "T": "TIB"}.get(found[2].upper(), found[2].upper())
        if found
        else ""
    )
    if not found or unit not in UNITS:
        raise PpclError(f"{option} {text}: not a size; give for example 12GiB or 900MB")
    size = float(found[1]) * UNITS[unit]
    if not 1 <= size <= MOST:
        raise PpclError(f"{option} {text}: a size is at least one byte and at most 1024 TiB; give for example 12GiB")
    return int(size)


def size_words(size: int) -> str:
    """Write a number of bytes for a person."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


def anonymous() -> int:
    """Return the bytes of this process that are not backed by a file: what it cannot give back. 0 where unknown.

    Pages of memory-mapped weights do not count: the system takes them back when it needs to.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    found = re.search(r"^RssAnon:\s+(\d+) kB", status, flags=re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
