"""Write files beside their names and rename them when all is well."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ppcl_fx.errors import PpclError
from ppcl_fx.export.names import manifest_path
from ppcl_fx.files import sync


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
        if embed:
            place.mkdir()
        yield place / graph.name if embed else place
    except OSError as error:
        reason = error.strerror or str(error)
        raise PpclError(f"{graph}: cannot be written ({reason}); choose a writable place with room") from error
    finally:
        if place.is_dir():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)


def publish(written: Path, final: Path) -> None:
    """Flush a file to disk and give it its name."""
    sync(written)
    os.replace(written, final)
    sync(final.parent)


def withdraw(graph: Path) -> None:
    """Remove a graph and its manifest, where they are: what they were made from is no more."""
    manifest_path(graph).unlink(missing_ok=True)
    graph.unlink(missing_ok=True)


def check_free(graphs: list[Path], overwrite: bool) -> None:
    """Raise `PpclError` where a graph exists and is not to be replaced."""
    for graph in graphs:
        if graph.parent.exists() and not graph.parent.is_dir():
            raise PpclError(f"{graph.parent}: is a file, and a folder is to be written there; choose another output")
        if graph.exists() and not overwrite:
            raise PpclError(f"{graph}: already exists; choose another output, or replace it with --overwrite")
