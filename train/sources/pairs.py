"""Pictures with captions, as they lie on disk: a folder with a list, one with captions beside, or WebDataset shards."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcl_fx.errors import PpclError, near
from ppcl_fx.files import inside
from ppcl_fx.reading import INDEX_BYTES, parse_json, read_bytes, read_text, text_of

METADATA, TABLE = "metadata.jsonl", "metadata.csv"
PICTURES = ("jpg", "jpeg", "png", "webp")
"""Endings of pictures in shards, and of those that have their caption beside them."""
CAPTION_KEYS = ("text", "caption", "prompt", "prompt_en", "caption_en")
"""Under which names a JSON object or a table holds a caption; the first one that holds text counts."""
CAPTION_BYTES = 2**20
"""A caption's file may be this large."""
IMAGE_BYTES = 256 * 2**20
"""A picture's file may be this large."""
EMPTY = "its caption is empty"


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
    """Return all pairs of a folder, of a folder of ``.tar`` shards, or of one shard.

    A folder holds ``metadata.jsonl`` or ``metadata.csv`` (Hugging Face's imagefolder), or pictures, in folders of any
    depth, each with its caption beside it: ``0001.jpg`` and ``0001.txt``, or ``0001.json``. Files whose names begin
    with a dot, and macOS' ``__MACOSX``, are nobody's data. No picture is read, and nothing is unpacked to disk.

    Raises:
        PpclError: There is no such data, a name leads out of the folder or archive, or an archive is damaged.
    """
    from ppcl_fx.train.sources.tars import open_tar

    path = Path(path)
    shards = sorted(shard for shard in path.glob("*.tar") if not hidden(shard.name)) if path.is_dir() else []
    if path.is_file() and path.suffix == ".tar":
        pairs = open_tar(path)
    elif (path / METADATA).is_file():
        pairs = _lines(path)
    elif (path / TABLE).is_file():
        pairs = _table(path)
    elif shards:
        pairs = [pair for shard in shards for pair in open_tar(shard)]
    elif path.is_dir() and (pictures := _pictures(path)):
        pairs = [_beside(path, picture) for picture in pictures]
    else:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        guess = "" if path.exists() else near(path.name, beside)
        raise PpclError(
            f"{path}: no pictures{guess}; give a folder with {METADATA} or {TABLE}, one of pictures with .txt files "
            "beside them, or one with .tar shards"
        )
    if not pairs:
        raise PpclError(f"{path}: holds no pictures with captions; give other data")
    return pairs


def hidden(name: str) -> bool:
    """Tell whether a file is no data: ``.DS_Store``, macOS' ``._0001.jpg``, anything below ``__MACOSX``."""
    parts = name.split("/")
    return parts[-1].startswith(".") or "__MACOSX" in parts


def caption_of(entry: dict[str, Any]) -> str | None:
    """Return the caption of a JSON object or a table's row, or None."""
    return next((entry[key] for key in CAPTION_KEYS if isinstance(entry.get(key), str)), None)


def caption_in(kind: str, data: bytes) -> tuple[str, str | None]:
    """Return the caption that a ``txt`` or ``json`` file holds, and what is wrong with it, if anything is."""
    try:
        if kind == "txt":
            text: str | None = text_of(data).strip()
        else:
            entry = parse_json(data)
            text = caption_of(entry) if isinstance(entry, dict) else None
    except (ValueError, RecursionError):
        return "", f"its caption ({kind}) cannot be read"
    if text is None:
        return "", "its json holds no caption"
    return text, None if text.strip() else EMPTY


def _lines(folder: Path) -> list[Pair]:
    lines = read_bytes(folder / METADATA, INDEX_BYTES).split(b"\n")
    return [_line(folder, f"{METADATA} line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]


def _line(folder: Path, name: str, line: bytes) -> Pair:
    try:
        entry = parse_json(line)
    except (ValueError, RecursionError):
        return Pair(name, problem="not valid JSON")
    return _listed(folder, name, entry if isinstance(entry, dict) else {})


def _table(folder: Path) -> list[Pair]:
    rows = csv.DictReader(io.StringIO(read_text(folder / TABLE, INDEX_BYTES)), strict=True)
    try:
        return [_listed(folder, f"{TABLE} line {rows.line_num}", row) for row in rows]
    except csv.Error as error:
        raise PpclError(f"{folder / TABLE}: line {rows.line_num}: {error}; write it again as CSV") from None


def _listed(folder: Path, name: str, entry: dict[str, Any]) -> Pair:
    file = entry.get("file_name")
    if not isinstance(file, str):
        return Pair(name, problem="has no 'file_name'")
    # A name that leaves the folder is no damage but an attack or a mistake: it stops the run. Windows writes "\\".
    picture = inside(folder, file.replace("\\", "/"))
    name = f"{name} ({file})"
    caption = caption_of(entry)
    if caption is None:
        return Pair(name, problem=f"has no caption under {', '.join(CAPTION_KEYS)}")
    return Pair(name, caption, lambda: _read(picture), None if caption.strip() else EMPTY)


def _pictures(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.suffix.lower().removeprefix(".") in PICTURES)
    return sorted(path for path in found if not hidden(path.relative_to(folder).as_posix()))


def _beside(folder: Path, picture: Path) -> Pair:
    file = picture.relative_to(folder).as_posix()
    picture = inside(folder, file)
    for kind in ("txt", "json"):
        caption = picture.with_suffix(f".{kind}")
        if caption.is_file():
            inside(folder, caption.relative_to(folder).as_posix())
            text, problem = caption_in(kind, read_bytes(caption, CAPTION_BYTES))
            return Pair(file, text, lambda: _read(picture), problem)
    return Pair(file, problem="has no caption (txt, json)")


def _read(path: Path) -> bytes:
    if not path.exists():
        raise FileNotFoundError(2, "No such file", str(path))
    try:
        return read_bytes(path, IMAGE_BYTES)
    except PpclError as error:
        raise OSError(str(error)) from None
