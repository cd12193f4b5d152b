"""What an exported folder holds: for each ratio its graph, its manifest, and its engine where one was built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ppcl_fx.errors import PpclError
from ppcl_fx.export.store.manifest import Manifest
from ppcl_fx.export.store.names import manifest_path, ratio_of
from ppcl_fx.export.tensorrt import EngineManifest, find_graphs
from ppcl_fx.export.tensorrt.places import GraphPlace
from ppcl_fx.io.files import inside, own_file, read_json


class _Kind(BaseModel):
    """The one field by which the kinds of JSON files are told apart."""

    model_config = ConfigDict(extra="ignore")
    kind: str = ""


@dataclass(frozen=True)
class Artefact:
    """The files of one ratio.

    Attributes:
        keep: the share of the teacher's parameters.
        graph: the ONNX file.
        manifest: what is written beside it.
        engine: the TensorRT engine; None too where one is of an older export.
        card: what is written beside that.
    """

    keep: float
    graph: Path
    manifest: Manifest
    engine: Path | None = None
    card: EngineManifest | None = None


def artefacts(folder: str | Path) -> dict[float, Artefact]:
    """Find the ratios in a folder that ``ppcl-fx export`` wrote: ``keep-0.7.json`` names ``keep-0.7.onnx``.

    Args:
        folder: the folder.

    Returns:
        The artefacts by their share, the largest first.

    Raises:
        PpclError: there are none, one is damaged, or names a file that is not there, is cut, or not in the folder.
    """
    folder = Path(folder)
    graphs: dict[float, tuple[Path, Manifest]] = {}
    for path in sorted(folder.glob("keep-*.json")) if folder.is_dir() else []:
        kind = read_json(own_file(path), _Kind).kind
        if kind == "onnx" and ratio_of(path) is not None:  # not one that is there for an engine alone
            manifest = read_json(path, Manifest)
            graphs[manifest.keep] = (_there(folder, manifest.file, path), manifest)
            for weights in manifest.weights:
                _there(folder, weights.file, path, weights.size)
    if not graphs:
        raise PpclError(
            f"{folder}: holds no exported ratio (no keep-*.json); make it with: ppcl-fx export STUDENT -o {folder}"
        )
    places = {place.name: place for place in find_graphs(folder)}
    found = {}
    for keep in sorted(graphs, reverse=True):
        graph, manifest = graphs[keep]
        found[keep] = Artefact(keep, graph, manifest, *_engine(places.get(graph.stem), manifest))
    return found


def _engine(place: GraphPlace | None, manifest: Manifest) -> tuple[Path, EngineManifest] | tuple[()]:
    """Return a ratio's engine, where it was built from the graph that is there now.

    An engine may be older than the graph, or from a graph in bfloat16 that was withdrawn; then there is none.
    """
    if place is None or not (place.card.is_file() and manifest_path(place.onnx).is_file()):
        return ()
    card = read_json(own_file(place.card), EngineManifest)
    made = read_json(own_file(manifest_path(place.onnx)), Manifest)
    built_from = (card.onnx, card.graph.bytes, card.graph.sha256)
    same = built_from == (place.onnx.name, made.size, made.sha256)
    if not same or (card.students, card.plan) != (manifest.students, manifest.plan):
        return ()
    return _there(place.root, card.file, place.card), card


def _there(folder: Path, name: str, named_in: Path, size: int | None = None) -> Path:
    path = inside(folder, name)
    if not path.is_file():
        raise PpclError(f"{path}: no such file, and {named_in.name} names it; copy it there, or export again")
    found = path.stat().st_size
    if size is not None and found != size:
        raise PpclError(f"{path}: has {found} bytes, and {size} were written; copy it again, or export again")
    return path
