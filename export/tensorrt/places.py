"""Where the graphs of an exported folder lie, and where what is built from them goes: all names are here."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, JsonValue

from ppcl_fx.errors import PpclError
from ppcl_fx.export.extras import need
from ppcl_fx.export.store.names import (
    engine_manifest_path,
    engine_path,
    manifest_path,
    ratio_of,
    typed_graph_path,
)
from ppcl_fx.io.files import inside, own_file, read_json
from ppcl_fx.schema.plan import Plan

if TYPE_CHECKING:
    from ppcl_fx.export.store.manifest import Port

REQUEST = "build.json"
SCRIPT = "build.sh"


@dataclass(frozen=True)
class GraphPlace:
    """One exported graph.

    Attributes:
        name: ``keep-0.7``.
        ratio: the share in its name.
        root: the folder with all ratios.
        onnx: the ONNX file that an engine is built from.
        sidecar: the JSON that says how the ratio was exported and compared; it may be missing.
    """

    name: str
    ratio: float
    root: Path
    onnx: Path
    sidecar: Path

    @property
    def engine(self) -> Path:
        """Where the engine goes."""
        return engine_path(self.onnx)

    @property
    def card(self) -> Path:
        """Where the engine's manifest goes."""
        return engine_manifest_path(self.engine)


def rebuild_command(engine: Path) -> str:
    """Return the command line that builds an engine again."""
    return f"ppcl-fx build {shlex.quote(str(engine.parent))} --overwrite"


def find_graphs(folder: str | Path) -> list[GraphPlace]:
    """Return the exported graphs in a folder, largest ratio first: of each the one that its engine is built from.

    Raises:
        PpclError: the folder is missing, or holds no exported graph.
    """
    root = Path(folder)
    if not root.is_dir():
        raise PpclError(f"{root}: no such folder; give what 'ppcl-fx export' wrote")
    found: list[GraphPlace] = []
    for graph in sorted(root.glob("*.onnx")):
        ratio, typed = ratio_of(graph), typed_graph_path(graph)
        if ratio is not None:
            used = typed if typed.is_file() else graph
            found.append(GraphPlace(graph.stem, ratio, root, own_file(used), manifest_path(graph)))
    if not found:
        raise PpclError(f"{root}: no exported graph (keep-0.7.onnx, for example); give what 'ppcl-fx export' wrote")
    return sorted(found, key=lambda place: -place.ratio)


@dataclass(frozen=True)
class GraphFile:
    """What an ONNX file says of itself.

    Attributes:
        inputs: its inputs.
        outputs: its outputs.
        dtype: the type of most of its weights.
        weights: the files that hold its weights, relative to it, in order; empty where they are in the file itself.
    """

    inputs: list[Port]
    outputs: list[Port]
    dtype: str
    weights: tuple[str, ...]


def read_graph(onnx: Path) -> GraphFile:
    """Read the head of an ONNX file; no weight is read.

    Raises:
        PpclError: it is missing, is damaged, or its weights are missing or lie outside of its folder.
    """
    if not onnx.is_file():
        raise PpclError(f"{onnx}: no such file; export the model again")
    from ppcl_fx.export.onnx.writer import ports

    ir = need("onnx_ir")
    try:
        model: Any = ir.load(onnx)
    except Exception as error:  # noqa: BLE001  protobuf's errors and onnx_ir's have no common class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PpclError(f"{onnx}: damaged ({reason}); export the model again") from None
    counts: Counter[str] = Counter()
    weights: dict[str, None] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        counts[tensor.dtype.name.lower()] += tensor.size
        if isinstance(tensor, ir.ExternalTensor):
            weights[str(tensor.location)] = None
    for name in weights:
        if not inside(onnx.parent, name).is_file():
            raise PpclError(f"{onnx.parent / name}: no such file, and {onnx.name} has its weights there; export again")
    dtype = counts.most_common(1)[0][0] if counts else "float"
    return GraphFile(ports(model.graph.inputs), ports(model.graph.outputs), dtype, tuple(weights))


class Origin(BaseModel):
    """What is read of the JSON beside an ONNX file: which mixture it is, and how well the graph was checked."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    keep: float | None = None
    students: list[str] = []
    plan: Plan | None = None
    parity: JsonValue = None


def read_origin(place: GraphPlace) -> Origin:
    """Return where a graph comes from; nothing is known without its JSON.

    Raises:
        PpclError: the JSON is damaged.
    """
    return read_json(own_file(place.sidecar), Origin) if place.sidecar.is_file() else Origin()
