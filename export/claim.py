"""One export at a time in a folder, and an end to what a killed one left there."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from ppcl_fx.errors import PpclError
from ppcl_fx.export.names import WEIGHTS
from ppcl_fx.reading import read_text

MARK = ".exporting"
"""Locked by the export that writes to a folder. It lists the graphs that were not there when that export began; where
the export is killed, the file stays."""

_PARTIAL = re.compile(r"\.+(.+?)\.partial-[0-9a-f]{8}(?:\.onnx|\.json)?(?:\.partial-[0-9a-f]{8})?")
"""A file, or a folder, that has no name yet: what it was to become."""

_OURS = re.compile(r"(keep-[0-9.]+(\.bf16)?|head)(\.json)?")


def unfinished(folder: Path) -> frozenset[str]:
    """Return the names of the graphs that an export was to write into a folder when it ended early."""
    try:
        return frozenset(read_text(folder / MARK).splitlines())
    except PpclError:
        return frozenset()


@contextmanager
def claimed(folder: Path, graphs: Collection[Path]) -> Iterator[None]:
    """Hold a folder while graphs are written to it, and remove what a killed export left half-written.

    Until the block ends well the graphs that it adds are marked as unfinished, so that the same command replaces them
    without being told to.

    Args:
        folder: the folder; exists.
        graphs: what is to be written.

    Raises:
        PpclError: another export holds the folder, or it cannot be written.
    """
    names = {graph.name for graph in graphs}
    with _locked(folder) as file:
        before = unfinished(folder)
        _sweep(folder, {graph.stem for graph in graphs})
        _write(file, before | {name for name in names if not (folder / name).exists()})
        done = False
        try:
            yield
            done = True
        finally:
            left = {name for name in unfinished(folder) if (folder / name).exists()} - (names if done else set())
            if left:
                _write(file, left)
            else:
                (folder / MARK).unlink(missing_ok=True)


def is_store(folder: Path) -> bool:
    """Tell whether a folder of weights, no link, holds nothing else: exports made it, or it is not there."""
    if folder.is_symlink():
        return False
    found = (path for path in folder.rglob("*") if not path.is_dir())
    return all(path.suffix == ".safetensors" or _PARTIAL.fullmatch(path.name) for path in found)


def _sweep(folder: Path, stems: Collection[str]) -> None:
    """Remove files without a name; nobody writes them any more, since the folder is held."""
    for path in list(folder.iterdir()):
        found = _PARTIAL.fullmatch(path.name)
        if found and (found[1] in stems or _OURS.fullmatch(found[1])):
            _remove(path)
    if is_store(folder / WEIGHTS):
        for path in list((folder / WEIGHTS).rglob(".*")):
            if _PARTIAL.fullmatch(path.name):
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Yield the marking file, open and locked; a process that is killed lets go of it."""
    mark = folder / MARK
    while True:
        try:
            file = os.open(mark, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except OSError as error:
            reason = error.strerror or str(error)
            raise PpclError(f"{folder}: cannot be written ({reason}); choose a writable place with room") from error
        try:
            _lock(file, folder)
            # Whoever held it before may have removed it since: then this file is nobody's.
            if mark.exists() and os.path.samestat(os.fstat(file), mark.stat()):
                yield file
                return
        finally:
            os.close(file)


def _lock(file: int, folder: Path) -> None:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass  # no such locks on Windows
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise PpclError(
                f"{folder}: another export is writing there; wait for its end, or choose another folder"
            ) from None


def _write(file: int, names: Collection[str]) -> None:
    """Write the list anew, where it is another; a name that is cut off by a kill is the name of no graph."""
    text = "".join(f"{name}\n" for name in sorted(names)).encode()
    try:
        if os.pread(file, len(text) + 1, 0) == text:
            return
        os.pwrite(file, text, 0)
        os.ftruncate(file, len(text))
        os.fsync(file)
    except OSError as error:
        reason = error.strerror or str(error)
        raise PpclError(f"{MARK}: cannot be written ({reason}); choose a writable place with room") from error
