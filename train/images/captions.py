"""Pictures with captions, as they lie on disk: a folder with a list, one with captions beside, or WebDataset shards."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any

from ppcl_fx.errors import PpclError, near
from ppcl_fx.io.files import inside
from ppcl_fx.io.reading import INDEX_BYTES, parse_json, read_bytes, read_text, text_of
from ppcl_fx.train.images.pictures import PICTURE_BYTES

METADATA, TABLE = "metadata.jsonl", "metadata.csv"
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jp2", "avif")
"""Endings of pictures in shards, and of those that have their caption beside them; of two, the first counts."""
TEXTS = ("txt", "caption", "json")
"""Endings of captions there; of two, the first counts."""
CAPTION_KEYS = ("text", "caption", "prompt", "prompt_en", "caption_en", "prompt_zh")
"""Under which names a JSON object or a table holds a caption; the first one that holds text counts."""
CAPTION_BYTES = 2**20
"""A caption, and its file, may be this large."""
EMPTY = "its caption is empty"
_ELSEWHERE = {
    f"*/{METADATA}": "give the folder that it is in",
    f"*/{TABLE}": "give the folder that it is in",
    "*.parquet": f"tables of this kind are not read, write names and captions to {METADATA}",
    "*/*.parquet": f"tables of this kind are not read, write names and captions to {METADATA}",
    "*.arrow": f"tables of this kind are not read, write names and captions to {METADATA}",
    "*.tar.*": "compressed shards are not read, unpack it to a plain .tar",
    "*.tgz": "compressed shards are not read, unpack it to a plain .tar",
}
"""Layouts that are not read, by what tells them, and what to do."""


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

    A folder holds ``metadata.jsonl`` or ``metadata.csv`` (Hugging Face's imagefolder); or shards, or pictures, in
    folders of any depth, each picture with its caption beside it: ``0001.jpg`` and ``0001.txt``, or ``0001.json``.
    What begins with a dot, and macOS' ``__MACOSX``, is nobody's data. No picture is read, nothing is unpacked to disk.

    Raises:
        PpclError: There is no such data, or none that can be used; a name leads out of the folder or archive, or an
            archive is damaged.
    """
    from ppcl_fx.train.images.webdataset import open_shard

    path = Path(path)
    if path.suffix == ".tar" and path.exists() and not path.is_dir():
        pairs = open_shard(path, path.name)
    elif (path / METADATA).exists() and (path / TABLE).exists():
        raise PpclError(f"{path}: holds {METADATA} and {TABLE}; keep the one that counts")
    elif (path / METADATA).exists():
        pairs = _lines(path)
    elif (path / TABLE).exists():
        pairs = _table(path)
    elif path.is_dir():
        names = _names(path)
        shards = [name for name in names if name.endswith(".tar")]
        pairs = [pair for name in shards for pair in open_shard(inside(path, name), name)] or _beside(path, names)
    else:
        pairs = []
    usable = any(pair.problem is None for pair in pairs)
    if not usable:
        raise _no_data(path, pairs)
    return pairs


def hidden(name: str) -> bool:
    """Tell whether a file is no data: ``.DS_Store``, macOS' ``._0001.jpg``, anything below ``.git`` or ``__MACOSX``."""
    return any(part == "__MACOSX" or (part.startswith(".") and part != ".") for part in name.split("/"))


def plain_name(name: str) -> str:
    """Return a file's name with the slashes of this system; one of Windows with a drive stays, and is no plain name."""
    return name if PureWindowsPath(name).drive else name.replace("\\", "/")


def caption_among(files: Mapping[str, Callable[[int], bytes]]) -> tuple[str, str | None]:
    """Return a sample's caption, and what is wrong with it, if anything is.

    Args:
        files: The sample's files by their endings; each reads its file of at most so many bytes, or raises OSError.
    """
    kind = next((kind for kind in TEXTS if kind in files), None)
    if kind is None:
        return "", f"has no caption ({', '.join(TEXTS)})"
    try:
        data = files[kind](CAPTION_BYTES)
        text: str | None = _caption(parse_json(data, finite=False)) if kind == "json" else text_of(data)
    except (OSError, ValueError) as error:
        return "", f"its caption ({kind}) cannot be read ({error})"
    return _checked(text) if text is not None else ("", f"its json holds no caption under {', '.join(CAPTION_KEYS)}")


def _caption(entry: Any) -> str | None:
    """The caption of a JSON object or a table's row: the first that is not blank; None where there is none at all."""
    found = [entry[key] for key in CAPTION_KEYS if isinstance(entry.get(key), str)] if isinstance(entry, dict) else []
    return next((text for text in found if text.strip()), found[0] if found else None)


def _checked(text: str) -> tuple[str, str | None]:
    text = text.strip().strip("\ufeff").strip()
    if not text:
        return "", EMPTY
    if "\0" in text:
        return "", "its caption holds NUL"
    return (text, None) if len(text) <= CAPTION_BYTES else ("", f"its caption has more than {CAPTION_BYTES} characters")


def _lines(folder: Path) -> list[Pair]:
    lines = read_bytes(folder / METADATA, INDEX_BYTES).split(b"\n")
    return [_line(folder, f"{METADATA} line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]


def _line(folder: Path, name: str, line: bytes) -> Pair:
    try:
        entry = parse_json(line, finite=False)  # other tools write NaN for what is missing
    except ValueError as error:
        return Pair(name, problem=f"not valid JSON ({error})")
    return _listed(folder, name, entry if isinstance(entry, dict) else {})


def _table(folder: Path) -> list[Pair]:
    rows = csv.DictReader(io.StringIO(read_text(folder / TABLE, INDEX_BYTES)), strict=True)
    try:
        columns = [column or "" for column in rows.fieldnames or []]
        if "file_name" not in columns:
            has = ", ".join(columns)[:200]
            raise PpclError(f"{folder / TABLE}: its first line names no column file_name ({has}); write it as CSV")
        return [_listed(folder, f"{TABLE} line {rows.line_num}", row) for row in rows]
    except csv.Error as error:
        raise PpclError(f"{folder / TABLE}: line {rows.reader.line_num}: {error}; write it again as CSV") from None


def _listed(folder: Path, name: str, entry: dict[str, Any]) -> Pair:
    file = entry.get("file_name")
    if not isinstance(file, str):
        return Pair(name, problem="has no 'file_name'")
    # A name that leaves the folder is no damage but an attack or a mistake: it stops the run.
    picture = inside(folder, plain_name(file))
    name = f"{name} ({file})"
    text = _caption(entry)
    if text is None:
        return Pair(name, problem=f"has no caption under {', '.join(CAPTION_KEYS)}")
    caption, problem = _checked(text)
    return Pair(name, caption, lambda: _read(picture, PICTURE_BYTES), problem)


def _names(folder: Path) -> list[str]:
    """The files of a folder at any depth, pipes and the like among them, by their names from there."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in found if not hidden(name))


def _beside(folder: Path, names: Sequence[str]) -> list[Pair]:
    """Pictures with their captions beside them: files of one name up to its last dot."""
    captions: dict[str, dict[str, Callable[[int], bytes]]] = {}
    pictures: list[tuple[str, str]] = []
    for name in names:
        stem, _, kind = name.rpartition(".")
        if kind.lower() in TEXTS:
            captions.setdefault(stem, {})[kind.lower()] = partial(_read, inside(folder, name))
        elif kind.lower() in PICTURES:
            pictures.append((name, stem))
    pairs = []
    for name, stem in pictures:
        caption, problem = caption_among(captions.get(stem, {}))
        pairs.append(Pair(name, caption, partial(_read, inside(folder, name), PICTURE_BYTES), problem))
    return pairs


def _read(path: Path, limit: int) -> bytes:
    try:
        return read_bytes(path, limit)
    except PpclError as error:
        raise OSError(str(error)) from None


def _no_data(path: Path, pairs: Sequence[Pair]) -> PpclError:
    """What to say of data without a single picture that can be used: the layout, where it is a known one."""
    found = ((p.relative_to(path), advice) for mark, advice in _ELSEWHERE.items() for p in sorted(path.glob(mark)))
    odd = next((f"; it holds {name}: {advice}" for name, advice in found), "") if path.is_dir() else ""
    if pairs:
        why = f"none of its {len(pairs)} samples can be used, the first is {pairs[0].name}: {pairs[0].problem}"
        return PpclError(f"{path}: {why}{odd or '; mend it, or give data of a kind that docs/data.md names'}")
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    guess = "" if path.exists() else near(path.name, beside)
    kinds = f"a folder with {METADATA} or {TABLE}, one of pictures with .txt files beside them, or one with .tar shards"
    return PpclError(f"{path}: no pictures with captions{guess}{odd or f'; give {kinds}'}")
