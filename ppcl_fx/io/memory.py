"""Memory in bytes: what a person writes, what this process holds, what a machine has."""

from __future__ import annotations

import re
from pathlib import Path

from ppcl_fx.errors import PpclError

UNITS = {"": 1, "B": 1, **{f"{unit}B": 1000**power for power, unit in enumerate("KMGT", 1)}}
UNITS |= {f"{unit}{rest}": 1024**power for power, unit in enumerate("KMGT", 1) for rest in ("", "IB")}
MOST = 2**50
"""Bytes that a size may be."""


def parse_size(option: str, text: str) -> int:
    """Return the bytes of a size such as ``12GiB``, ``900 MB`` or a plain number; PpclError for anything else."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in UNITS:
        raise PpclError(f"{option} {text}: not a size; give for example 12GiB or 900MB")
    size = float(found[1]) * UNITS[found[2].upper()]
    if not 1 <= size <= MOST:
        raise PpclError(f"{option} {text}: a size is at least one byte and at most 1024 TiB; give for example 12GiB")
    return int(size)


def size_words(size: int) -> str:
    """Write a number of bytes for a person."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


def anonymous() -> int:
    """Return the bytes of this process that no file backs, so that it cannot give them back; 0 where unknown."""
    return _status("self", "RssAnon")


def peak_memory(process: int | str = "self") -> int:
    """Return the most bytes that a process, by its id, has had in memory so far, files mapped there included; 0 where
    that is unknown.
    """
    return _status(process, "VmHWM")


def _status(process: int | str, field: str) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except (OSError, UnicodeError):
        return 0
    found = re.search(rf"^{field}:\s+(\d+) kB", status, flags=re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
