"""One export at a time in a folder: files are written beside and renamed, and what a killed one left is removed."""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ppcl_fx.errors import PpclError
from ppcl_fx.export.store.manifest import Manifest
from ppcl_fx.export.store.names import WEIGHTS, data_path, manifest_path, typed_graph_path
from ppcl_fx.io import owned_folders as owned
from ppcl_fx.io.files import sync, write_json
from ppcl_fx.io.reading import read_text

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
    """Hold a folder, which exists, while graphs are written to it, and remove what a killed export left half-written.

    Until the block ends well the graphs that it adds are marked as unfinished, so that the same command replaces them
    without being told to.
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
    left = [(path, _PARTIAL.fullmatch(path.name)) for path in folder.iterdir()]
    partial = [path for path, found in left if found and (found[1] in stems or _OURS.fullmatch(found[1]))]
    if is_store(folder / WEIGHTS):
        partial += [path for path in (folder / WEIGHTS).rglob(".*") if _PARTIAL.fullmatch(path.name)]
    for path in partial:
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
        with writing(folder):
            file = os.open(mark, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
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
    with writing(Path(MARK)):
        if os.pread(file, len(text) + 1, 0) != text:
            os.pwrite(file, text, 0)
            os.ftruncate(file, len(text))
            os.fsync(file)


@contextmanager
def beside(graph: Path, *, embed: bool) -> Iterator[Path]:
    """Yield where to write a graph before it has its name; what is left there afterwards vanishes.

    Where its weights come with it (`embed`) that is a folder of its own. Else it lies in the same folder as in the end:
    the places of its weights are relative to that.
    """
    place = graph.with_name(f".{graph.stem}.partial-{uuid.uuid4().hex[:8]}{'' if embed else '.onnx'}")
    try:
        with writing(graph):
            if embed:
                place.mkdir()
            yield place / graph.name if embed else place
    finally:
        _remove(place)
        manifest_path(place).unlink(missing_ok=True)


@contextmanager
def writing(final: Path) -> Iterator[None]:
    """Let an error of the system name the file that was to be made, and not the one written in its place."""
    try:
        yield
    except (OSError, PpclError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        reason = cause.strerror or str(cause)
        raise PpclError(f"{final}: cannot be written ({reason}); make room, or choose another place") from cause


def publish(written: Path, data: Path | None, manifest: Manifest, final: Path) -> None:
    """Give a graph, the file of its own weights and its manifest their names.

    All of them are whole and on disk before the first has its name. What is about the files that are replaced goes
    first, and the new manifest comes last: whoever reads in between, or after a kill, finds no manifest, and never one
    of other files.
    """
    described = manifest_path(written)
    write_json(described, manifest)
    for path in (written, data):
        if path is not None:
            sync(path)
    typed = typed_graph_path(final)  # made from what is replaced
    for old in (manifest_path(typed), typed, manifest_path(final)):
        old.unlink(missing_ok=True)
    sync(final.parent)
    if data is not None:
        os.replace(data, data_path(final))
    os.replace(written, final)
    sync(final.parent)
    os.replace(described, manifest_path(final))
    sync(final.parent)


def check_free(graphs: Sequence[Path], overwrite: bool) -> None:
    """Raise `PpclError` where a graph exists and is not to be replaced; one that a killed export left may be."""
    for graph in graphs:
        if graph.parent.exists() and not graph.parent.is_dir():
            raise PpclError(f"{graph.parent}: is a file, and a folder is to be written there; choose another output")
        if graph.exists() and not overwrite and graph.name not in unfinished(graph.parent):
            raise PpclError(f"{graph}: already exists; choose another output, or replace it with --overwrite")
        owned.check_file(graph, mark=owned.GRAPH_MARK)
