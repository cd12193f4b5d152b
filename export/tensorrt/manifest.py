"""The manifest of an engine: what it was built from, for what, and whether it may be loaded here."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue

from ppcl_fx._version import __version__
from ppcl_fx.errors import PpclError
from ppcl_fx.export.store.manifest import FileManifest, FileMark, mark_of
from ppcl_fx.export.store.names import engine_manifest_path
from ppcl_fx.export.tensorrt.options import BuildOptions
from ppcl_fx.export.tensorrt.profiles import Profile
from ppcl_fx.export.tensorrt_api import LIBRARIES, Api, Kind
from ppcl_fx.io.files import inside, own_file, read_json

NOT_COMPARED = "the engine was not compared with PyTorch: the build does not run it"


class EngineManifest(FileManifest):
    """The JSON beside an engine.

    Attributes:
        onnx: name of the ONNX file it was built from, in the same folder; `graph` is its size and hash.
        weights: size and hash of each file with weights, by its path from that folder.
        library: what built it; `tensorrt` is its version.
        cuda: the newest version of CUDA that the driver took. With `gpu` and `capability`, the GPU it was built on and
            for, None for an engine of TensorRT for RTX, which is for all cards of these `capabilities`.
        profiles: the shapes it takes, in the order of TensorRT's profile indices.
        timing_cache: path of the timing cache from that folder; ``None`` where there was none.
        parity: the engine's difference to PyTorch for each call it was compared on; ``None`` if it was not.
        graph_parity: what the ONNX file's own manifest says of its difference to PyTorch.
        layers: layers of the network before the compiler fused any; None in older manifests.
        peak_memory: the most bytes that the process that built it held; None where that is unknown.
        seconds: what the build took.
    """

    version: Literal[2] = 2
    kind: Literal["tensorrt"] = "tensorrt"
    engine: FileMark
    onnx: str
    graph: FileMark
    weights: dict[str, FileMark]
    library: Kind = "tensorrt"
    tensorrt: str
    cuda: str | None
    gpu: str | None
    capability: str | None
    capabilities: list[str] = Field([])
    profiles: list[Profile]
    options: BuildOptions
    timing_cache: str | None
    parity: dict[str, float] | None = None
    graph_parity: JsonValue = None
    not_checked: list[str] = Field([NOT_COMPARED])
    layers: int | None = None
    peak_memory: int | None = None
    seconds: float
    made_by: str = __version__


def rebuild_command(engine: Path) -> str:
    """Return the command line that builds an engine again."""
    return f"ppcl-fx build {shlex.quote(str(engine.parent))} --overwrite"


def read_engine_manifest(engine: Path) -> EngineManifest:
    """Return an engine's manifest; `PpclError` where it or the engine is missing or damaged."""
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
    """Raise `PpclError` for an engine that does not belong here, with the command that builds it again.

    The graph's file is always read through, those with weights if `read_weights` says so; else their sizes count.
    """
    reason = _fault(manifest, engine, api, read_weights)
    if reason:
        raise PpclError(f"{engine}: {reason}; build it here: {rebuild_command(engine)}")


def _fault(manifest: EngineManifest, engine: Path, api: Api, read_weights: bool) -> str | None:
    size, wanted = engine.stat().st_size, manifest.engine.bytes
    if size != wanted:
        return f"has {size} bytes and {wanted} are expected: truncated or replaced"
    if manifest.library != api.kind:
        return f"built with {LIBRARIES[manifest.library].name}, and this is {api.name}"
    if api.gpu is not None:
        gpu, cards = f"{api.gpu.name} ({api.gpu.capability})", manifest.capabilities
        if cards and api.gpu.capability not in cards:
            return f"built for cards of compute capability {', '.join(cards)}, and this is {gpu}"
        if not cards and gpu != f"{manifest.gpu} ({manifest.capability})":
            return f"built for {manifest.gpu} ({manifest.capability}), and this is {gpu}"
    if manifest.tensorrt != api.version:
        return f"built with {api.name} {manifest.tensorrt}, and this is {api.version}"
    for name, mark in {manifest.onnx: manifest.graph, **manifest.weights}.items():
        path = inside(engine.parent, name)
        if not path.is_file():
            return f"{name}, which it was built from, is missing"
        read = read_weights or name == manifest.onnx
        if path.stat().st_size != mark.bytes or (read and mark_of(path) != mark):
            return f"{name} is not the file it was built from"
    return None
