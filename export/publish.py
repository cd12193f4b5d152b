"""Write files beside their names and rename them when all is well."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ppcl_fx import owned
from ppcl_fx.errors import PpclError
from ppcl_fx.export.claim import unfinished
from ppcl_fx.export.names import data_path, manifest_path, typed_graph_path
from ppcl_fx.export.sidecar import Sidecar
from ppcl_fx.files import sync, write_json


@contextmanager
def beside(graph: Path, *, embed: bool) -> Iterator[Path]:
    """Yield where to write a graph before it has its name; what is left there afterwards vanishes.

    Args:
        graph: where it will lie.
        embed: its weights come with it, so it is written in a folder of its own, under its own name. Else it lies in
            the same folder as in the end: the places of its weights are relative to that.
    """
    mark = f"partial-{uuid.uuid4().hex[:8]}"
    place = graph.with_name(f".{graph.stem}.{mark}" if embed else f".{graph.stem}.{mark}.onnx")
    try:
        with writing(graph):
            if embed:
                place.mkdir()
            yield place / graph.name if embed else place
    finally:
        if place.is_dir():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)
        _card(place).unlink(missing_ok=True)


@contextmanager
def writing(final: Path) -> Iterator[None]:
    """Let an error of the system name the file that was to be made, and not the one written in its place.

    Raises:
        PpclError: the block raised an `OSError`, or a `PpclError` that came from one.
    """
    try:
        yield
    except (OSError, PpclError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        reason = cause.strerror or str(cause)
        raise PpclError(f"{final}: cannot be written ({reason}); make room, or choose another place") from cause


def publish(written: Path, data: Path | None, card: Sidecar, final: Path) -> None:
    """Give a graph, the file of its own weights and its manifest their names.

    All of them are whole and on disk before the first has its name. What is about the files that are replaced goes
    first, and the new manifest comes last: whoever reads in between, or after a kill, finds no manifest, and never one
    of other files.

    Args:
        written: the graph, where `beside` said.
        data: the weights that were written with it.
        card: the manifest.
        final: the graph's name.
    """
    manifest = _card(written)
    write_json(manifest, card)
    for path in (written, data):
        if path is not None:
            sync(path)
    withdraw(typed_graph_path(final))  # made from what is replaced
    manifest_path(final).unlink(missing_ok=True)
    sync(final.parent)
    if data is not None:
        os.replace(data, data_path(final))
    os.replace(written, final)
    sync(final.parent)
    os.replace(manifest, manifest_path(final))
    sync(final.parent)


def withdraw(graph: Path) -> None:
    """Remove a graph and its manifest, where they are: what they were made from is no more."""
    manifest_path(graph).unlink(missing_ok=True)
    graph.unlink(missing_ok=True)


def check_free(graphs: Sequence[Path], overwrite: bool) -> None:
    """Raise `PpclError` where a graph exists and is not to be replaced; one that a killed export left may be."""
    for graph in graphs:
        if graph.parent.exists() and not graph.parent.is_dir():
            raise PpclError(f"{graph.parent}: is a file, and a folder is to be written there; choose another output")
        if graph.exists() and not overwrite and graph.name not in unfinished(graph.parent):
            raise PpclError(f"{graph}: already exists; choose another output, or replace it with --overwrite")
        owned.check_file(graph, mark=owned.GRAPH_MARK)


def _card(written: Path) -> Path:
    """Where the manifest of a graph lies before it has its name."""
    return written.with_suffix(".json")
