"""The manifest of an engine: what it was built from, for what, and whether it may be loaded here."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue

from ppcl_fx._version import __version__
from ppcl_fx.errors import PpclError
from ppcl_fx.export.store.manifest import FileManifest, FileMark, mark_of
from ppcl_fx.export.store.names import engine_manifest_path
from ppcl_fx.export.tensorrt.options import BuildOptions
from ppcl_fx.export.tensorrt.places import rebuild_command
from ppcl_fx.export.tensorrt.profiles import Profile
from ppcl_fx.export.tensorrt_api import Api
from ppcl_fx.io.files import inside, own_file, read_json

NOT_COMPARED = "the engine was not compared with PyTorch: the build does not run it"


class EngineManifest(FileManifest):
    """The JSON beside an engine.

    Attributes:
        engine: size and hash of the engine.
        onnx: name of the ONNX file it was built from, in the same folder.
        graph: size and hash of that file.
        weights: size and hash of each file with weights, by its path from that folder.
        tensorrt: version of TensorRT.
        cuda: the newest version of CUDA that the driver took.
        gpu: the GPU it was built on, and for.
        capability: that GPU's compute capability.
        profiles: the shapes it takes, in the order of TensorRT's profile indices.
        options: how it was built.
        timing_cache: path of the timing cache from that folder; ``None`` where there was none.
        parity: the engine's difference to PyTorch for each call it was compared on; ``None`` if it was not.
        graph_parity: what the ONNX file's own manifest says of its difference to PyTorch.
        not_checked: what was not checked, and why.
        seconds: what the build took.
        made_by: version of this package.
    """

    version: Literal[2] = 2
    kind: Literal["tensorrt"] = "tensorrt"
    engine: FileMark
    onnx: str
    graph: FileMark
    weights: dict[str, FileMark]
    tensorrt: str
    cuda: str
    gpu: str
    capability: str
    profiles: list[Profile]
    options: BuildOptions
    timing_cache: str | None
    parity: dict[str, float] | None = None
    graph_parity: JsonValue = None
    not_checked: list[str] = Field([NOT_COMPARED])
    seconds: float
    made_by: str = __version__


def read_engine_manifest(engine: Path) -> EngineManifest:
    """Return an engine's manifest.

    Raises:
        PpclError: the engine or the manifest is missing or damaged.
    """
    if not engine.is_file():
        raise PpclError(f"{engine}: no such engine; build it: {rebuild_command(engine)}")
    path = engine_manifest_path(engine)
    if not path.is_file():
        raise PpclError(
            f"{path}: no such file, so nothing says what the engine is for; build it here: {rebuild_command(engine)}"
        )
    own_file(engine)
    return read_json(own_file(path), EngineManifest)


def check_engine(manifest: EngineManifest, engine: Path, api: Api, read_weights: bool) -> None:
    """Refuse an engine that does not belong here.

    Args:
        manifest: the engine's manifest.
        engine: the engine.
        api: what is to run it.
        read_weights: read the files with weights through, too; without that only their sizes are compared. The graph's
            file is always read.

    Raises:
        PpclError: the engine is truncated, or was built for another GPU, with another version of TensorRT, or from
            another graph or other weights. The line has the command that builds it again.
    """
    reason = _misfit(manifest, engine, api) or _changed(manifest, engine.parent, read_weights)
    if reason:
        raise PpclError(f"{engine}: {reason}; build it here: {rebuild_command(engine)}")


def _misfit(manifest: EngineManifest, engine: Path, api: Api) -> str | None:
    size, wanted = engine.stat().st_size, manifest.engine.bytes
    if size != wanted:
        return f"has {size} bytes and {wanted} are expected: truncated or replaced"
    if (manifest.gpu, manifest.capability) != (api.gpu.name, api.gpu.capability):
        here = f"{api.gpu.name} ({api.gpu.capability})"
        return f"built for {manifest.gpu} ({manifest.capability}), and this is {here}"
    same = manifest.tensorrt == api.version
    return None if same else f"built with TensorRT {manifest.tensorrt}, and this is {api.version}"


def _changed(manifest: EngineManifest, folder: Path, read_weights: bool) -> str | None:
    for name, mark in {manifest.onnx: manifest.graph, **manifest.weights}.items():
        path = inside(folder, name)
        if not path.is_file():
            return f"{name}, which it was built from, is missing"
        read = read_weights or name == manifest.onnx
        if path.stat().st_size != mark.bytes or (read and mark_of(path) != mark):
            return f"{name} is not the file it was built from"
    return None
