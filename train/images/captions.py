"""Pictures with captions, as they lie on disk: a folder with a list, one with captions beside, or WebDataset shards."""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

from ppcl_fx.errors import PpclError, near
from ppcl_fx.io.files import inside
from ppcl_fx.io.reading import INDEX_BYTES, open_regular, parse_json, read_bytes, read_text, text_of
from ppcl_fx.train.images.pictures import PICTURE_BYTES

METADATA, TABLE = "metadata.jsonl", "metadata.csv"
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jp2", "avif")
"""Endings of pictures in shards, and of those that have their caption beside them; of two, the first counts."""
TEXTS = ("txt", "caption", "json")  # endings of captions there; of two, the first counts
CAPTION_KEYS = ("text", "caption", "prompt", "prompt_en", "caption_en", "prompt_zh")
"""Under which names a JSON object or a table holds a caption; the first one that holds text counts."""
CAPTION_BYTES = 2**20  # a caption, and its file, may be this large
HEADER_BYTES = 2**20  # what describes one member of a shard may be this large
_AGAIN = "write the shard again with plain files under relative names"
_ELSEWHERE = {
    **dict.fromkeys((f"*/{METADATA}", f"*/{TABLE}"), "give the folder that it is in"),
    **dict.fromkeys(
        ("*.parquet", "*/*.parquet", "*.arrow"),
        f"tables of this kind are not read, write names and captions to {METADATA}",
    ),
    **dict.fromkeys(("*.tar.*", "*.tgz"), "compressed shards are not read, unpack it to a plain .tar"),
}
"""Layouts that are not read, by what tells them, and what to do."""


@dataclass(frozen=True)
class Pair:
    """One picture and its caption.

    `name` is for messages, `read` reads the picture's file or raises OSError, `problem` says why it cannot be used.
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
    Raises PpclError where there is no such data, or none that can be used, and where a name leads out of the folder or
    archive.
    """
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
        every = (file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir())  # pipes too
        names = sorted(name for name in every if not hidden(name))
        shards = [name for name in names if name.endswith(".tar")]
        pairs = [pair for name in shards for pair in open_shard(inside(path, name), name)] or _beside(path, names)
    else:
        pairs = []
    if not any(pair.problem is None for pair in pairs):
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

    `files` are the sample's, by their endings; each reads its file of at most so many bytes, or raises OSError.
    """
    kind = next((kind for kind in TEXTS if kind in files), None)
    if kind is None:
        return "", f"has no caption ({', '.join(TEXTS)})"
    try:
        data = files[kind](CAPTION_BYTES)
        text: str | None = _caption(parse_json(data, finite=False)) if kind == "json" else text_of(data)
    except (OSError, ValueError) as error:
        return "", f"its caption ({kind}) cannot be read ({error})"
    return _checked(text, "its json holds")


def _caption(entry: Any) -> str | None:
    """The caption of a JSON object or a table's row: the first that is not blank; None where there is none at all."""
    found = [entry[key] for key in CAPTION_KEYS if isinstance(entry.get(key), str)] if isinstance(entry, dict) else []
    return next((text for text in found if text.strip()), found[0] if found else None)


def _checked(text: str | None, holder: str) -> tuple[str, str | None]:
    if text is None:
        return "", f"{holder} no caption under {', '.join(CAPTION_KEYS)}"
    text = text.strip().strip("\ufeff").strip()
    if not text:
        return "", "its caption is empty"
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
    caption, problem = _checked(_caption(entry), "has")
    return Pair(f"{name} ({file})", caption, partial(_read, picture, PICTURE_BYTES), problem)


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


def open_shard(path: Path, name: str) -> list[Pair]:
    """Return the pairs of a shard, called `name` in messages, in its order: files with one stem are one sample.

    A sample is ``STEM.jpg`` (or another ending of `PICTURES`) with ``STEM.txt``, or with ``STEM.json`` that holds the
    caption. A stem ends at its first dot, so ``STEM.1.0.jpg``, as the paper's shards have it, is a picture of STEM.
    Raises PpclError where the archive is damaged or compressed, or a member is a link, a device, or under a name that
    leads out of it.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    twice: set[str] = set()
    try:
        with open_regular(path) as file, tarfile.open(fileobj=_Headers(file), mode="r:") as tar:  # type: ignore[call-overload]
            for member in tar:
                inner = _plain_member(path, member)
                if member.isdir() or hidden(inner):
                    continue
                stem, kind = _stem(inner)
                if kind.rpartition(".")[2] not in (*PICTURES, *TEXTS):
                    continue
                if kind in samples.setdefault(stem, {}):
                    twice.add(stem)
                samples[stem][kind] = member
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise PpclError(f"{path}: not a whole uncompressed tar archive ({reason}); copy it again") from None
    return [_pair(path, f"{name}:{stem}", members, stem in twice) for stem, members in samples.items()]


class _Headers:
    """A shard's file as `tarfile` reads it for the headers: a damaged one cannot ask for gigabytes at once."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        if not 0 <= size <= HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._read(size)


def _plain_member(path: Path, member: tarfile.TarInfo) -> str:
    """The name of a member that can be read, with the slashes of this system."""
    plain = plain_name(member.name)
    name = PurePosixPath(plain)
    if name.is_absolute() or ".." in name.parts or "\\" in plain or "\0" in plain:
        raise PpclError(f"{path}: the member {member.name!r} leaves the archive; {_AGAIN}")
    if member.size < 0 or member.issparse() or not (member.isreg() or member.isdir()):
        what = "a link" if member.issym() or member.islnk() else "no plain file"
        raise PpclError(f"{path}: the member {member.name!r} is {what}; {_AGAIN}")
    return plain


def _stem(name: str) -> tuple[str, str]:
    """A WebDataset name: the stem ends at the first dot of the last part."""
    folder, slash, last = name.rpartition("/")
    stem, _, kind = last.partition(".")
    return folder + slash + stem, kind.lower()


def _pair(path: Path, name: str, members: dict[str, tarfile.TarInfo], twice: bool) -> Pair:
    pictures = [kind for kind in members if kind.rpartition(".")[2] in PICTURES]
    if twice:
        return Pair(name, problem="has two files of one kind")
    if not pictures:
        return Pair(name, problem=f"has no picture ({', '.join(PICTURES)})")
    # Of a.jpg and a.mask.png the first is the picture; of a.1.jpg and a.2.jpg nobody can tell.
    plain = [kind for kind in pictures if kind in PICTURES] or pictures
    if len(plain) > 1 and not set(plain) <= set(PICTURES):
        return Pair(name, problem=f"has several pictures ({', '.join(plain)})")
    picture = members[min(plain, key=lambda kind: PICTURES.index(kind.rpartition(".")[2]))]
    caption, problem = caption_among({kind: partial(_read_member, path, member) for kind, member in members.items()})
    return Pair(name, caption, partial(_read_member, path, picture, PICTURE_BYTES), problem)


def _read_member(path: Path, member: tarfile.TarInfo, limit: int) -> bytes:
    if member.size > limit:
        raise OSError(f"larger than {limit} bytes")
    with open_regular(path) as file:
        file.seek(member.offset_data)
        data = file.read(member.size)
    if len(data) != member.size:
        raise OSError("cut short")
    return data
