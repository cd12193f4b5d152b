"""Pictures with captions, as they lie on disk: a folder with ``metadata.jsonl``, or WebDataset shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcl_fx.errors import PpclError, near
from ppcl_fx.files import inside

METADATA = "metadata.jsonl"
CAPTION_KEYS = ("text", "caption", "prompt")
"""Under which names a JSON object holds a caption; the first that is there counts."""
IMAGE_BYTES = 256 * 2**20
"""A picture's file may be this large."""


@dataclass(frozen=True)
class Pair:
    """One picture and its caption.

    Attributes:
        name: Where it lies, for messages.
        caption: What it shows.
        read: Reads the picture's file; raises OSError.
        problem: Why it cannot be used; None when nothing is known to be wrong.
    """

    name: str
    caption: str = ""
    read: Callable[[], bytes] = bytes
    problem: str | None = None


def open_pairs(path: str | Path) -> list[Pair]:
    """Return all pairs of a folder with ``metadata.jsonl``, of a folder of ``.tar`` shards, or of one shard.

    No picture is read, and nothing is unpacked to disk.

    Raises:
        PpclError: There is no such data, a name leads out of the folder or archive, or an archive is damaged.
    """
    from ppcl_fx.train.sources.tars import open_tar

    path = Path(path)
    if path.is_file() and path.suffix == ".tar":
        pairs = open_tar(path)
    elif (path / METADATA).is_file():
        pairs = _folder(path)
    elif path.is_dir() and any(path.glob("*.tar")):
        pairs = [pair for shard in sorted(path.glob("*.tar")) for pair in open_tar(shard)]
    else:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        guess = "" if path.exists() else near(path.name, beside)
        raise PpclError(f"{path}: no pictures{guess}; give a folder with {METADATA}, or one with .tar shards")
    if not pairs:
        raise PpclError(f"{path}: holds no pictures with captions; give other data")
    return pairs


def caption_of(entry: dict[str, Any]) -> str | None:
    """Return the caption of a JSON object, or None."""
    found = next((entry[key] for key in CAPTION_KEYS if key in entry), None)
    return found if isinstance(found, str) else None


def _folder(folder: Path) -> list[Pair]:
    path = folder / METADATA
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise PpclError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from None
    return [_line(folder, f"{METADATA} line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]


def _line(folder: Path, name: str, line: bytes) -> Pair:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return Pair(name, problem="not valid JSON")
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        return Pair(name, problem="has no 'file_name'")
    # A name that leaves the folder is no damage but an attack or a mistake: it stops the run.
    picture = inside(folder, entry["file_name"])
    name = f"{name} ({entry['file_name']})"
    caption = caption_of(entry)
    if caption is None:
        return Pair(name, problem=f"has no caption under {', '.join(CAPTION_KEYS)}")
    return Pair(name, caption, lambda: _read(picture))


def _read(path: Path) -> bytes:
    if path.stat().st_size > IMAGE_BYTES:
        raise OSError(f"larger than {IMAGE_BYTES} bytes")
    return path.read_bytes()
