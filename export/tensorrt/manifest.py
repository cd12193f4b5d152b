"""The JSON beside an engine: what it was built from, for what, and whether it may be loaded here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue

from ppcl_fx._version import __version__
from ppcl_fx.errors import PpclError
from ppcl_fx.export.store.manifest import Port
from ppcl_fx.export.store.names import engine_manifest_path
from ppcl_fx.export.tensorrt.options import BuildOptions
from ppcl_fx.export.tensorrt.places import rebuild_command
from ppcl_fx.export.tensorrt.profiles import Profile
from ppcl_fx.export.tensorrt_api import Gpu
from ppcl_fx.io.files import inside, own_file, read_json, sha256_of
from ppcl_fx.schema.plan import Plan

NOT_COMPARED = "the engine was not compared with PyTorch: the build does not run it"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileMark(_Strict):
    """A file by its size in bytes and its hash."""

    bytes: int
    sha256: str


class EngineManifest(_Strict):
    """The JSON beside an engine.

    Attributes:
        file: name of the engine file in the same folder.
        engine: its size and hash.
        onnx: name of the ONNX file it was built from, in the same folder.
        graph: size and hash of that file.
        weights: size and hash of each file with weights, by its path from that folder.
        dtype: type of most weights.
        keep: the share of the teacher's parameters.
        students: ids of the edits that are plugged.
        plan: the plan they come from.
        tensorrt: version of TensorRT.
        cuda: the newest version of CUDA that the driver took.
        gpu: the GPU it was built on, and for.
        capability: that GPU's compute capability.
        profiles: the shapes it takes, in the order of TensorRT's profile indices.
        options: how it was built.
        inputs: its inputs; a name in a shape is a size of the profiles.
        outputs: its outputs.
        timing_cache: path of the timing cache from that folder; ``None`` where there was none.
        parity: the engine's difference to PyTorch for each call it was compared on; ``None`` if it was not.
        graph_parity: what the ONNX file's own JSON says of its difference to PyTorch.
        not_checked: what was not checked, and why.
        seconds: what the build took.
        made_by: version of this package.
    """

    version: Literal[2] = 2
    kind: Literal["tensorrt"] = "tensorrt"
    file: str
    engine: FileMark
    onnx: str
    graph: FileMark
    weights: dict[str, FileMark]
    dtype: str
    keep: float | None
    students: list[str]
    plan: Plan | None
    tensorrt: str
    cuda: str
    gpu: str
    capability: str
    profiles: list[Profile]
    options: BuildOptions
    inputs: list[Port]
    outputs: list[Port]
    timing_cache: str | None
    parity: dict[str, float] | None = None
    graph_parity: JsonValue = None
    not_checked: list[str] = [NOT_COMPARED]
    seconds: float
    made_by: str = __version__


class Hashes:
    """Hashes of files; a file that many graphs share is read once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int], FileMark] = {}

    def mark(self, path: Path) -> FileMark:
        """Return the size and hash of a file."""
        stat = path.stat()
        key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
        if key not in self._known:
            self._known[key] = FileMark(bytes=stat.st_size, sha256=sha256_of(path))
        return self._known[key]


def read_card(engine: Path) -> EngineManifest:
    """Return an engine's manifest.

    Raises:
        PpclError: the engine or the manifest is missing or damaged.
    """
    if not engine.is_file():
        raise PpclError(f"{engine}: no such engine; build it: {rebuild_command(engine)}")
    card = engine_manifest_path(engine)
    if not card.is_file():
        raise PpclError(
            f"{card}: no such file, so nothing says what the engine is for; build it here: {rebuild_command(engine)}"
        )
    own_file(engine)
    return read_json(own_file(card), EngineManifest)


def check_card(
    card: EngineManifest, engine: Path, *, gpu: Gpu, tensorrt: str, hashes: Hashes | None = None, weights: bool = False
) -> None:
    """Refuse an engine that does not belong here.

    Args:
        card: the engine's manifest.
        engine: the engine.
        gpu: the GPU it is to run on.
        tensorrt: the version of TensorRT that is to run it.
        hashes: known hashes.
        weights: read the files with weights through, too; without that only their sizes are compared. The graph's
            file is always read.

    Raises:
        PpclError: the engine is truncated, or was built for another GPU, with another version of TensorRT, or from
            another graph or other weights. The line has the command that builds it again.
    """
    reason = _misfit(card, engine, gpu, tensorrt) or _changed(card, engine, hashes or Hashes(), weights)
    if reason:
        raise PpclError(f"{engine}: {reason}; build it here: {rebuild_command(engine)}")


def _misfit(card: EngineManifest, engine: Path, gpu: Gpu, tensorrt: str) -> str | None:
    if engine.stat().st_size != card.engine.bytes:
        return f"has {engine.stat().st_size} bytes and {card.engine.bytes} are expected: truncated or replaced"
    if (card.gpu, card.capability) != (gpu.name, gpu.capability):
        return f"built for {card.gpu} ({card.capability}), and this is {gpu.name} ({gpu.capability})"
    return None if card.tensorrt == tensorrt else f"built with TensorRT {card.tensorrt}, and this is {tensorrt}"


def _changed(card: EngineManifest, engine: Path, hashes: Hashes, weights: bool) -> str | None:
    sources: Mapping[str, FileMark] = {card.onnx: card.graph, **card.weights}
    for name, mark in sources.items():
        path = inside(engine.parent, name)
        if not path.is_file():
            return f"{name}, which it was built from, is missing"
        read = weights or name == card.onnx
        if path.stat().st_size != mark.bytes or (read and hashes.mark(path) != mark):
            return f"{name} is not the file it was built from"
    return None
