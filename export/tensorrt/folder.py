"""Build the engines of an exported folder, one for each ratio."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcl_fx.errors import PpclError
from ppcl_fx.export.store.manifest import mark_of
from ppcl_fx.export.store.names import TIMINGS, engine_path, manifest_path
from ppcl_fx.export.tensorrt.build import build_engine, check_library
from ppcl_fx.export.tensorrt.manifest import EngineManifest, check_engine, read_engine_manifest
from ppcl_fx.export.tensorrt.monitor import Report, silent
from ppcl_fx.export.tensorrt.options import BuildOptions
from ppcl_fx.export.tensorrt.profiles import Profile
from ppcl_fx.export.tensorrt.request import BuildConfig, Origin, find_graphs, read_request
from ppcl_fx.export.tensorrt_api import Api, load_builder
from ppcl_fx.export.verify.integrity import check_artefacts
from ppcl_fx.io.files import own_file, read_json


@dataclass(frozen=True)
class Built:
    """One engine of a folder: the ratio's name (``keep-0.7``), the file, and whether it was there already, and fits."""

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
    report: Report = silent,
) -> list[Built]:
    """Build an engine for each graph of an exported folder.

    Everything that can be refused is refused before the first build. An engine that is there already, for this GPU,
    version, graph, profiles and options, is kept: a build that was stopped goes on where it was.

    Args:
        config: what to build; by default what ``build.json`` in the folder says.
        api: the library, with the GPU that it builds for; found if left out.
        report: told the share that is done of all builds in percent, 100, and what is being done.

    Raises:
        PpclError: a graph or its weights are not what was exported, the profiles do not fit, an engine is there already
            and is another, or a build fails. Engines that were built before stay.
    """
    graphs = find_graphs(folder)
    config = config or read_request(folder)
    profiles = {name: config.profiles(onnx) for name, onnx in graphs.items()}
    api = api or load_builder(f"the ONNX files stay in {folder}", config.library)
    check_library(api, config.options)
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
        told = folder / f"{name}.json"
        manifest = kept.get(name) or build_engine(
            onnx,
            engines[name],
            profiles[name],
            config.options,
            api=api,
            cache=folder / TIMINGS,
            origin=read_json(own_file(told), Origin) if told.is_file() else None,
            report=_part(report, index, len(graphs), name),
        )
        results.append(Built(name, engines[name], manifest, kept=name in kept))
    return results


def _wanted(engine: Path, profiles: list[Profile], options: BuildOptions, api: Api) -> EngineManifest:
    """Return the manifest of an engine that is there, and refuse one that is not the one wanted."""
    try:
        manifest = read_engine_manifest(engine)
        check_engine(manifest, engine, api, read_weights=True)
    except PpclError as error:
        raise PpclError(f"{engine}: is there already and does not fit; replace it with --overwrite") from error
    if manifest.profiles != profiles or manifest.options.wanted != options.wanted:
        raise PpclError(f"{engine}: is there already with other profiles or options; replace it with --overwrite")
    return manifest


def _part(report: Report, index: int, count: int, name: str) -> Report:
    return lambda done, total, phase: report((100 * index + 100 * done // total) // count, 100, f"{name}: {phase}")
