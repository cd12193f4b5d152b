"""What an exported folder holds: for each ratio its graph, its manifest, and its engine where one was built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ppcl_fx.errors import PpclError
from ppcl_fx.export.store.manifest import Manifest
from ppcl_fx.export.store.names import engine_manifest_path, engine_path, manifest_path, ratio_of
from ppcl_fx.export.tensorrt.manifest import EngineManifest
from ppcl_fx.export.tensorrt.request import find_graphs
from ppcl_fx.io.files import inside, own_file, read_json


@dataclass(frozen=True)
class Artefact:
    """The files of one ratio: the ONNX file and its manifest, and that of the engine, where one fits the graph."""

    graph: Path
    manifest: Manifest
    engine_manifest: EngineManifest | None = None

    @property
    def engine(self) -> Path | None:
        """The TensorRT engine."""
        return None if self.engine_manifest is None else self.graph.with_name(self.engine_manifest.file)


def artefacts(folder: str | Path) -> dict[float, Artefact]:
    """Find the ratios in a folder that ``ppcl-fx export`` wrote: ``keep-0.7.json`` names ``keep-0.7.onnx``.

    The largest share comes first.

    Raises:
        PpclError: there are none, one is damaged, or names a file that is not there, is cut, or not in the folder.
    """
    folder = Path(folder)
    graphs: dict[float, tuple[Path, Manifest]] = {}
    for path in sorted(folder.glob("keep-*.json")) if folder.is_dir() else []:
        if ratio_of(path) is not None:  # not one that is there for an engine alone
            manifest = read_json(own_file(path), Manifest)
            graphs[manifest.keep] = (_there(folder, manifest.file, path), manifest)
            for weights in manifest.weights:
                _there(folder, weights.file, path, weights.size)
    if not graphs:
        raise PpclError(
            f"{folder}: holds no exported ratio (no keep-*.json); make it with: ppcl-fx export STUDENT -o {folder}"
        )
    built_from = find_graphs(folder)
    return {
        keep: Artefact(graph, manifest, _engine(built_from.get(graph.stem), manifest))
        for keep, (graph, manifest) in sorted(graphs.items(), reverse=True)
    }


def _engine(onnx: Path | None, manifest: Manifest) -> EngineManifest | None:
    """Return the manifest of a ratio's engine, where it was built from the graph that is there now.

    An engine may be older than the graph, or from a graph in bfloat16 that was withdrawn; then there is none.
    """
    if onnx is None:
        return None
    path = engine_manifest_path(engine_path(onnx))
    if not (path.is_file() and manifest_path(onnx).is_file()):
        return None
    engine = read_json(own_file(path), EngineManifest)
    made = read_json(own_file(manifest_path(onnx)), Manifest)
    built_from = (engine.onnx, engine.graph.bytes, engine.graph.sha256)
    same = built_from == (onnx.name, made.size, made.sha256)
    if not same or (engine.students, engine.plan) != (manifest.students, manifest.plan):
        return None
    _there(onnx.parent, engine.file, path)
    return engine


def _there(folder: Path, name: str, named_in: Path, size: int | None = None) -> Path:
    path = inside(folder, name)
    if not path.is_file():
        raise PpclError(f"{path}: no such file, and {named_in.name} names it; copy it there, or export again")
    found = path.stat().st_size
    if size is not None and found != size:
        raise PpclError(f"{path}: has {found} bytes, and {size} were written; copy it again, or export again")
    return path
