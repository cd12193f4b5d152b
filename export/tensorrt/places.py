"""Where the graphs of an exported folder lie, and where what is built from them goes: all names are here."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue

from ppcl_fx.errors import PpclError
from ppcl_fx.export.extras import need
from ppcl_fx.export.onnx_file import ports
from ppcl_fx.export.sidecar import Port
from ppcl_fx.files import inside, read_json
from ppcl_fx.plan import Plan

TYPED = "transformer.bf16.onnx"
PLAIN = "transformer.onnx"
TIMINGS = "timing.cache"
REQUEST = "build.json"
SCRIPT = "build.sh"
_RATIO = re.compile(r"keep-([0-9]*\.?[0-9]+)")


@dataclass(frozen=True)
class Place:
    """One exported graph.

    Attributes:
        name: ``keep-0.7``.
        root: the folder with all ratios.
        onnx: the ONNX file that an engine is built from.
        sidecar: the JSON that says how it was exported; it may be missing.
    """

    name: str
    root: Path
    onnx: Path
    sidecar: Path

    @property
    def engine(self) -> Path:
        """Where the engine goes."""
        return self.onnx.with_suffix(".engine")

    @property
    def card(self) -> Path:
        """Where the engine's manifest goes."""
        return card_of(self.engine)


def card_of(engine: Path) -> Path:
    """Return the manifest of an engine."""
    return engine.with_name(f"{engine.name}.json")


def typed_file(onnx: Path) -> Path:
    """Return where the graph of an exported ratio goes in the type that an engine computes in."""
    return onnx.with_name(TYPED)


def root_of(engine: Path) -> Path:
    """Return the folder with all ratios that an engine belongs to."""
    return engine.parent.parent if _RATIO.fullmatch(engine.parent.name) else engine.parent


def rebuild_command(engine: Path) -> str:
    """Return the command line that builds an engine again."""
    return f"ppcl-fx build {shlex.quote(str(root_of(engine)))} --overwrite"


def find_graphs(folder: str | Path) -> list[Place]:
    """Return the exported graphs in a folder, largest ratio first: ``keep-0.7.onnx``, or ``keep-0.7/transformer.onnx``.

    Raises:
        PpclError: the folder is missing, or holds no exported graph.
    """
    root = Path(folder)
    if not root.is_dir():
        raise PpclError(f"{root}: no such folder; give what 'ppcl-fx export' wrote")
    found: list[Place] = []
    for entry in sorted(root.iterdir()):
        if entry.is_file() and entry.suffix == ".onnx" and _RATIO.fullmatch(entry.stem):
            found.append(Place(entry.stem, root, entry, entry.with_suffix(".json")))
        elif entry.is_dir() and _RATIO.fullmatch(entry.name):
            graphs = [entry / name for name in (TYPED, PLAIN) if (entry / name).is_file()]
            found += [Place(entry.name, root, graph, entry / "transformer.json") for graph in graphs[:1]]
    if not found:
        raise PpclError(f"{root}: no exported graph (keep-0.7.onnx, for example); give what 'ppcl-fx export' wrote")
    return sorted(found, key=lambda place: -float(place.name.removeprefix("keep-")))


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


def read_origin(place: Place) -> Origin:
    """Return where a graph comes from; nothing is known without its JSON.

    Raises:
        PpclError: the JSON is damaged.
    """
    return read_json(place.sidecar, Origin) if place.sidecar.is_file() else Origin()
