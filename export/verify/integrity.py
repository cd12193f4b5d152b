"""Are exported files still what was written? Hashes, samples, sizes, and where a graph says that its weights are."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Collection
from pathlib import Path

from ppcl_fx.errors import PpclError
from ppcl_fx.export.extras import need
from ppcl_fx.export.store.manifest import Manifest
from ppcl_fx.export.store.names import manifest_path
from ppcl_fx.io.files import inside, own_file, read_json, sha256_of
from ppcl_fx.io.reading import open_regular, read_bytes
from ppcl_fx.io.shards import stored_tensors

AGAIN = "export it again, or copy the whole folder again"
GRAPH_BYTES = 2**31
"""A graph may be this large without its weights: protobuf's own bound."""


def check_artefacts(
    path: str | Path, *, hashes: bool = True, sha256: Callable[[Path], str] = sha256_of
) -> list[Manifest]:
    """Check exported graphs and their weights against their manifests.

    Args:
        path: a graph, or a folder: then every graph in it that has a manifest.
        hashes: read every weight file whole, and compare sha256; else existence, place, size and a sample of each
            tensor are looked at. Graphs are always read whole.
        sha256: gives a file's hash, where some are known already.

    Returns:
        The manifests.

    Raises:
        PpclError: a file is missing, is cut, has other content, or lies where runtimes do not take it from.
    """
    path = Path(path)
    graphs = [path] if not path.is_dir() else [g for g in sorted(path.glob("*.onnx")) if manifest_path(g).is_file()]
    if not graphs:
        raise PpclError(f"{path}: holds no exported graph with its manifest; give what 'ppcl-fx export' wrote")
    once = functools.cache(sha256)
    return [_check(graph, hashes, once) for graph in graphs]


def _check(graph: Path, hashes: bool, sha256: Callable[[Path], str]) -> Manifest:
    card = read_json(own_file(manifest_path(graph)), Manifest)
    if card.file != graph.name:
        raise PpclError(f"{manifest_path(graph)}: is about {card.file} and not about {graph.name}; {AGAIN}")
    if not graph.is_file():
        raise PpclError(f"{graph}: no such file, and {manifest_path(graph).name} is about it; {AGAIN}")
    _check_places(graph, {weight.file: weight.size for weight in card.weights})
    _check_size(graph, card.size)
    if sha256(graph) != card.sha256:
        raise PpclError(f"{graph}: its content is not what was written (sha256); {AGAIN}")
    for weight in card.weights:
        path = graph.parent / weight.file
        _check_size(path, weight.size)
        if not (sha256(path) == weight.sha256 if hashes else weight.sample in (None, sample_of(path))):
            raise PpclError(
                f"{path}: its content is not what was written ({'sha256' if hashes else 'a sample of it'}), and "
                f"{graph.name} was made for that: trained again since, or another file? {AGAIN}"
            )
    return card


def _check_size(path: Path, size: int) -> None:
    found = path.stat().st_size
    if found != size:
        raise PpclError(f"{path}: has {found} bytes, and {size} were written; {AGAIN}")


def _check_places(graph: Path, listed: dict[str, int]) -> None:
    """Every weight is within a file of the manifest, and every such file one that runtimes take.

    That is a plain one in the folder of the graph, or, where the graph is a link to a hub cache's blobs, another such
    link: runtimes look for weights beside what the graph's link leads to as well.
    """
    own_file(graph)
    for name in listed:
        path = inside(graph.parent, name)
        if not path.is_file():
            raise PpclError(f"{path}: no such file, and {graph.name} needs it: its weights moved; {AGAIN}")
        if not graph.is_symlink() and (path.is_symlink() or path.stat().st_nlink > 1):
            raise PpclError(f"{path}: is a link, and runtimes refuse weights behind links; put a copy there")
    for name, first, length in external_data(graph):
        inside(graph.parent, name)
        if name not in listed:
            raise PpclError(f"{graph}: has weights in {name!r}, which its manifest does not name; {AGAIN}")
        if first < 0 or length < 0 or first + length > listed[name]:
            raise PpclError(f"{graph}: has a weight beyond the end of {name}; {AGAIN}")


def external_data(graph: Path) -> list[tuple[str, int, int]]:
    """Return file, first byte and length of every weight of a graph that lies outside of it; no weight is read.

    Raises:
        PpclError: it is no ONNX file.
    """
    onnx = need("onnx")
    data = read_bytes(graph, GRAPH_BYTES)
    try:
        proto = onnx.load_model_from_string(data)
    except Exception as error:  # noqa: BLE001 - protobuf's DecodeError has no public home
        reason = " ".join(str(error).split())[:120]
        raise PpclError(f"{graph}: not an ONNX file ({reason}); {AGAIN}") from None
    found = []
    for tensor in proto.graph.initializer:
        told = {entry.key: entry.value for entry in tensor.external_data}
        try:
            if tensor.data_location == tensor.EXTERNAL:
                found.append((told["location"], int(told["offset"]), int(told["length"])))
        except (KeyError, ValueError):
            raise PpclError(f"{graph}: does not say where the weight {tensor.name} lies; {AGAIN}") from None
    return found


def cards_in(folder: Path) -> dict[str, Manifest]:
    """Return the manifests of a folder's graphs by their names; what is not ours, or older, is passed over."""
    found = {}
    for path in (manifest_path(graph) for graph in sorted(folder.glob("*.onnx"))):
        try:
            found[path.name] = read_json(path, Manifest)
        except PpclError:
            continue
    return found


def used_by_others(folder: Path, name: str, apart: Collection[str]) -> str | None:
    """Return a manifest in a folder that names a weight file, those in `apart` aside; None if there is none."""
    for card, found in cards_in(folder).items():
        if card not in apart and any(weight.file == name for weight in found.weights):
            return card
    return None


SPOT = 256
"""Bytes read at the beginning, in the middle and at the end of each tensor."""

PIECES = 256
"""Into how many pieces a file that does not name its tensors is cut."""


def sample_of(path: Path) -> str:
    """Return a digest of a file's size, of where its tensors lie, and of some bytes of each of them.

    A step of training moves every value of a weight, so the digest is another one then. It does not see a single
    changed byte: that takes a hash.

    Raises:
        PpclError: the file cannot be read, or is a safetensors file whose header is damaged.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            places = _places(path, size)
            found = hashlib.sha256(f"{size} {places}".encode())
            for first, length in places:
                last = first + length
                for at in sorted({first, first + length // 2, max(first, last - SPOT)}):
                    file.seek(at)
                    found.update(file.read(min(SPOT, last - at)))
    except OSError as error:
        reason = error.strerror or str(error)
        raise PpclError(f"{path}: cannot be read ({reason}); check the path and its permissions") from error
    return found.hexdigest()


def _places(path: Path, size: int) -> list[tuple[int, int]]:
    """Return first byte and length of each tensor of a file, or of the pieces it is cut into."""
    if path.suffix == ".safetensors":
        return sorted((part.offset, part.nbytes) for part in stored_tensors(path).values())
    step = max(1, -(-size // PIECES))
    return [(first, min(step, size - first)) for first in range(0, size, step)]
