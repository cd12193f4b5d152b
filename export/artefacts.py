"""Are exported files still what was written? Hashes, sizes, and where a graph says that its weights are."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ppcl_fx.errors import PpclError
from ppcl_fx.export.extras import need
from ppcl_fx.export.names import manifest_path
from ppcl_fx.export.sidecar import Sidecar
from ppcl_fx.files import inside, read_json, sha256_of

AGAIN = "export it again, or copy the whole folder again"


def check_artefacts(path: str | Path, *, hashes: bool = True) -> list[Sidecar]:
    """Check exported graphs and their weights against their manifests.

    Args:
        path: a graph, or a folder: then every graph in it that has a manifest.
        hashes: read every file whole, and compare sha256; else existence, size and place alone are looked at.

    Returns:
        The manifests.

    Raises:
        PpclError: a file is missing, is cut, has other content, or lies where runtimes do not take it from.
    """
    path = Path(path)
    graphs = [path] if not path.is_dir() else [g for g in sorted(path.glob("*.onnx")) if manifest_path(g).is_file()]
    if not graphs:
        raise PpclError(f"{path}: holds no exported graph with its manifest; give what 'ppcl-fx export' wrote")
    seen: dict[str, str] = {}
    return [_check(graph, hashes, seen) for graph in graphs]


def _check(graph: Path, hashes: bool, seen: dict[str, str]) -> Sidecar:
    card = read_json(manifest_path(graph), Sidecar)
    if card.file != graph.name:
        raise PpclError(f"{manifest_path(graph)}: is about {card.file} and not about {graph.name}; {AGAIN}")
    if not graph.is_file():
        raise PpclError(f"{graph}: no such file, and {manifest_path(graph).name} is about it; {AGAIN}")
    _check_places(graph, {weight.file: weight.size for weight in card.weights})
    _same(graph, card.size, card.sha256, hashes, {})
    for weight in card.weights:
        _same(graph.parent / weight.file, weight.size, weight.sha256, hashes, seen)
    return card


def _check_places(graph: Path, listed: dict[str, int]) -> None:
    """Every weight is within a file of the manifest, and every such file a plain one in the folder of the graph."""
    for name in listed:
        path = inside(graph.parent, name)
        if not path.is_file():
            raise PpclError(f"{path}: no such file, and {graph.name} needs it: its weights moved; {AGAIN}")
        if path.is_symlink() or path.stat().st_nlink > 1:
            raise PpclError(f"{path}: is a link, and runtimes refuse weights behind links; put a copy there")
    for name, first, length in external_data(graph):
        inside(graph.parent, name)
        if name not in listed:
            raise PpclError(f"{graph}: has weights in {name!r}, which its manifest does not name; {AGAIN}")
        if first < 0 or length < 0 or first + length > listed[name]:
            raise PpclError(f"{graph}: has a weight beyond the end of {name}; {AGAIN}")


def _same(path: Path, size: int, sha256: str, hashes: bool, seen: dict[str, str]) -> None:
    found = path.stat().st_size
    if found != size:
        raise PpclError(f"{path}: has {found} bytes, and {size} were written; {AGAIN}")
    if hashes:
        key = os.fspath(path)
        seen[key] = seen.get(key) or sha256_of(path)
        if seen[key] != sha256:
            raise PpclError(f"{path}: its content is not what was written (sha256); {AGAIN}")


def external_data(graph: Path) -> list[tuple[str, int, int]]:
    """Return file, first byte and length of every weight of a graph that lies outside of it; no weight is read.

    Raises:
        PpclError: it is no ONNX file.
    """
    onnx = need("onnx")
    try:
        proto = onnx.load(str(graph), load_external_data=False)
    except Exception as error:  # noqa: BLE001 - protobuf's DecodeError has no public home
        reason = " ".join(str(error).split())[:120]
        raise PpclError(f"{graph}: not an ONNX file ({reason}); {AGAIN}") from None
    return [_place(graph, tensor) for tensor in proto.graph.initializer if tensor.data_location == tensor.EXTERNAL]


def _place(graph: Path, tensor: Any) -> tuple[str, int, int]:
    told = {entry.key: entry.value for entry in tensor.external_data}
    try:
        return told["location"], int(told["offset"]), int(told["length"])
    except (KeyError, ValueError):
        raise PpclError(f"{graph}: does not say where the weight {tensor.name} lies; {AGAIN}") from None


def used_by_others(folder: Path, name: str, apart: Collection[str]) -> str | None:
    """Return a manifest in a folder that names a weight file, those in `apart` aside; None if there is none."""
    for graph, card in _manifests(folder):
        if manifest_path(graph).name not in apart and any(weight.file == name for weight in card.weights):
            return manifest_path(graph).name
    return None


def with_other_weights(folder: Path, name: str, sha256: str) -> list[Path]:
    """Return the graphs in a folder whose manifest names a weight file with other content than it has now."""
    return [
        graph
        for graph, card in _manifests(folder)
        if any(weight.file == name and weight.sha256 != sha256 for weight in card.weights)
    ]


def _manifests(folder: Path) -> Iterator[tuple[Path, Sidecar]]:
    for graph in sorted(folder.glob("*.onnx")):
        if manifest_path(graph).is_file():
            try:
                card = read_json(manifest_path(graph), Sidecar)
            except PpclError:
                continue  # not ours, or older: it cannot be about this store
            yield graph, card
