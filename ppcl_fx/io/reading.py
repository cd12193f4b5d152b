"""Opening what comes from outside, so what this process did not just write: regular files of a bounded size."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from ppcl_fx.errors import PpclError, near
from ppcl_fx.io.memory import size_words

JSON_BYTES, TEXT_BYTES = 32 * 2**20, 64 * 2**20
"""A JSON or text file may be this large, where its reader says no other bound."""
INDEX_BYTES = 2**30
"""A JSON file that grows with the data, such as an index of calls or the losses of a run, may be this large."""
BOM = b"\xef\xbb\xbf"
"""UTF-8's byte order mark."""
_OTHER_BOMS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file (or a link to one) to read its bytes; it never blocks.

    PpclError where it is a folder, a pipe or the like, cannot be opened, or is not there; then a near name is told.
    """
    return os.fdopen(_descriptor(Path(path), os.O_RDONLY), "rb")


def append_regular(path: str | Path) -> BufferedWriter:
    """Open a regular file to append bytes to it, and make it where there is none; else as `open_regular`."""
    return os.fdopen(_descriptor(Path(path), os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")


def _descriptor(path: Path, how: int) -> int:
    siblings: list[str] = []
    careful = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        if path.exists():  # before it is opened: some devices act on that alone
            _check_kind(path, path.stat().st_mode)
        descriptor = os.open(path, how | careful, 0o666)
    except FileNotFoundError:
        with suppress(OSError):  # only a guess is lost
            siblings = [one.name for one in path.parent.iterdir()]
        raise PpclError(f"{path}: no such file{near(path.name, siblings)}; check the path") from None
    except (OSError, ValueError) as error:  # a ValueError: a name with a NUL, or that has no bytes
        reason = getattr(error, "strerror", None) or str(error)
        raise PpclError(f"{path}: cannot be opened ({reason}); check the path and its permissions") from None
    try:
        _check_kind(path, os.fstat(descriptor).st_mode)
    except PpclError:
        os.close(descriptor)
        raise
    return descriptor


def read_bytes(path: str | Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes; PpclError as `open_regular`, or it is larger."""
    with open_regular(path) as file, os_errors(path, "cannot be read", "copy it again"):
        size = os.fstat(file.fileno()).st_size
        data = file.read(limit + 1) if size <= limit else b""
    if size > limit or len(data) > limit:
        bound = size_words(limit) if limit >= 2**20 else f"{limit} bytes"
        raise PpclError(f"{path}: larger than the {bound} that such a file may have; check the path")
    return data


@contextmanager
def os_errors(path: str | Path, what: str, advice: str) -> Iterator[None]:
    """Let an `OSError` of the block be a PpclError: what cannot be done with a file or folder, why, what to do."""
    try:
        yield
    except OSError as error:
        raise PpclError(f"{path}: {what} ({error.strerror or error}); {advice}") from error


def read_text(path: str | Path, limit: int = TEXT_BYTES) -> str:
    """Return the text of a UTF-8 file as `text_of` does. Raises PpclError as `read_bytes`, or it is no such text."""
    try:
        return text_of(read_bytes(path, limit))
    except ValueError as error:
        raise PpclError(f"{path}: no UTF-8 text ({error}); save it as UTF-8") from None


def text_of(data: bytes) -> str:
    r"""Return UTF-8 text without a byte order mark at its start or at that of a line, each line ended by ``\n``.

    ValueError where it is UTF-16, holds NUL bytes, or is not UTF-8.
    """
    try:
        text = _plain(data).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is {data[error.start]:#04x}: {error.reason}") from None
    if "\0" in text:
        raise ValueError("it holds NUL bytes")
    # A mark within a file is what remains of files that were joined.
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\n\ufeff", "\n")


def parse_json(data: bytes, *, finite: bool = True) -> Any:
    """Return what JSON text holds: numbers are finite unless told otherwise, of 4300 digits, lists 200 deep at most.

    ValueError for any other text.
    """
    found = from_json(_plain(data), allow_inf_nan=not finite)
    waiting = [found] if finite else []
    while waiting:
        match waiting.pop():
            case float() as number if not math.isfinite(number):
                raise ValueError("a number is too large")
            case list() as items:
                waiting += items
            case dict() as entries:
                waiting += entries.values()
    return found


def check_model_folder(folder: Path) -> None:
    """Refuse a folder where a library that loads a model would open what is no regular file, or too long a text."""
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if path.exists() and not path.is_dir():
            status = path.stat()
            _check_kind(path, status.st_mode)
            if path.suffix in (".json", ".txt", ".jinja") and status.st_size > TEXT_BYTES:
                raise PpclError(f"{path}: larger than the {size_words(TEXT_BYTES)} that such a file may have; check it")


def _plain(data: bytes) -> bytes:
    for mark, name in _OTHER_BOMS.items():
        if data.startswith(mark):
            raise ValueError(f"it is {name}, not UTF-8")
    return data.removeprefix(BOM)


def _check_kind(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise PpclError(f"{path}: is {kind}, and a file is to be read; give a regular file")
