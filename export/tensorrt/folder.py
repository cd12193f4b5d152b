"""Build the engines of an exported folder, one for each ratio."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcl_fx.errors import PpclError
from ppcl_fx.export.store.manifest import mark_of
from ppcl_fx.export.store.names import TIMINGS, engine_path, manifest_path
from ppcl_fx.export.tensorrt.build import build_engine
from ppcl_fx.export.tensorrt.manifest import EngineManifest, check_engine, read_engine_manifest
from ppcl_fx.export.tensorrt.monitor import Report
from ppcl_fx.export.tensorrt.options import BuildOptions, check_version
from ppcl_fx.export.tensorrt.places import Origin, find_graphs
from ppcl_fx.export.tensorrt.profiles import Profile
from ppcl_fx.export.tensorrt.request import BuildConfig, read_request
from ppcl_fx.export.tensorrt_api import Api, load_tensorrt
from ppcl_fx.export.verify.integrity import check_artefacts
from ppcl_fx.io.files import own_file, read_json


@dataclass(frozen=True)
class Built:
    """One engine of a folder.

    Attributes:
        name: the ratio, ``keep-0.7``.
        engine: the engine.
        manifest: what is written beside it.
        kept: whether it was there already, and fits.
    """

    name: str
    engine: Path
    manifest: EngineManifest
    kept: bool

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON knows them."""
        card = self.manifest.model_dump(mode="json", exclude={"plan"})
        return {"name": self.name, "engine": str(self.engine), "kept": self.kept, "card": card}


def build_folder(
    folder: Path,
    config: BuildConfig | None = None,
    *,
    overwrite: bool = False,
    api: Api | None = None,
    report: Report | None = None,
) -> list[Built]:
    """Build an engine for each graph of an exported folder.

    Everything that can be refused is refused before the first build. An engine that is there already, for this GPU,
    version, graph, profiles and options, is kept: a build that was stopped goes on where it was.

    Args:
        folder: the folder.
        config: what to build; by default what ``build.json`` in the folder says.
        overwrite: replace engines that are there.
        api: TensorRT and the GPU; found if left out.
        report: told the share that is done of all builds in percent, 100, and what is being done.

    Raises:
        PpclError: the folder holds no graph, a graph or its weights are not what was exported, the profiles do not fit,
            there is no TensorRT or no GPU, an engine is there already and is another, or a build fails. Engines that
            were built before stay.
    """
    graphs = find_graphs(folder)
    config = config or read_request(folder)
    profiles = {name: config.profiles(onnx) for name, onnx in graphs.items()}
    api = api or load_tensorrt(f"the ONNX files stay in {folder}")
    check_version(api.version, config.options)
    for onnx in graphs.values():
        if manifest_path(onnx).is_file():
            check_artefacts(onnx, sha256=lambda path: mark_of(path).sha256)
    engines = {name: engine_path(onnx) for name, onnx in graphs.items()}
    kept = {
        name: _wanted(engine, profiles[name], config.options, api)
        for name, engine in engines.items()
        if engine.exists() and not overwrite
    }
    results = []
    for index, (name, onnx) in enumerate(graphs.items()):
        manifest = kept.get(name) or build_engine(
            onnx,
            engines[name],
            profiles[name],
            config.options,
            api=api,
            cache=folder / TIMINGS,
            origin=read_origin(folder / f"{name}.json"),
            report=_part(report, index, len(graphs), name),
        )
        results.append(Built(name, engines[name], manifest, kept=name in kept))
    return results


def read_origin(manifest: Path) -> Origin:
    """Return where a graph comes from; nothing is known without its manifest."""
    return read_json(own_file(manifest), Origin) if manifest.is_file() else Origin()


def _wanted(engine: Path, profiles: list[Profile], options: BuildOptions, api: Api) -> EngineManifest:
    """Return the manifest of an engine that is there, and refuse one that is not the one wanted."""
    try:
        manifest = read_engine_manifest(engine)
        check_engine(manifest, engine, api, read_weights=True)
    except PpclError as error:
        raise PpclError(f"{engine}: is there already and does not fit; replace it with --overwrite") from error
    if manifest.profiles != profiles or manifest.options != options:
        raise PpclError(f"{engine}: is there already with other profiles or options; replace it with --overwrite")
    return manifest


def _part(report: Report | None, index: int, count: int, name: str) -> Report | None:
    """Report one build as a part of all."""
    if report is None:
        return None

    def show(done: int, total: int, phase: str) -> None:
        report((100 * index + 100 * done // total) // count, 100, f"{name}: {phase}")

    return show
