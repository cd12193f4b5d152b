"""The graphs of an exported folder: where they lie, and what each says of itself."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, JsonValue

from ppcl_fx.errors import PpclError
from ppcl_fx.export.extras import need
from ppcl_fx.export.store.names import ratio_of, typed_graph_path
from ppcl_fx.io.files import inside, own_file
from ppcl_fx.schema.plan import Plan

if TYPE_CHECKING:
    from ppcl_fx.export.store.manifest import Port


def rebuild_command(engine: Path) -> str:
    """Return the command line that builds an engine again."""
    return f"ppcl-fx build {shlex.quote(str(engine.parent))} --overwrite"


def find_graphs(folder: Path) -> dict[str, Path]:
    """Return the graphs that engines are built from, ``keep-0.7.onnx`` or ``keep-0.7.bf16.onnx`` by the name
    ``keep-0.7``, the largest ratio first.

    Raises:
        PpclError: the folder is missing, or holds no exported graph.
    """
    if not folder.is_dir():
        raise PpclError(f"{folder}: no such folder; give what 'ppcl-fx export' wrote")
    ratios = {graph: ratio for graph in sorted(folder.glob("*.onnx")) if (ratio := ratio_of(graph)) is not None}
    if not ratios:
        raise PpclError(f"{folder}: no exported graph (keep-0.7.onnx, for example); give what 'ppcl-fx export' wrote")
    found = {}
    for graph in sorted(ratios, key=lambda graph: -ratios[graph]):
        typed = typed_graph_path(graph)
        found[graph.stem] = own_file(typed if typed.is_file() else graph)
    return found


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


def load_onnx(onnx: Path) -> Any:
    """Return an ONNX file as an `onnx_ir.Model`, its weights unread where they lie outside of it.

    Raises:
        PpclError: it is damaged.
    """
    ir = need("onnx_ir")
    try:
        return ir.load(onnx)
    except Exception as error:  # noqa: BLE001  protobuf's errors and onnx_ir's have no common class
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise PpclError(f"{onnx}: damaged, or not an ONNX file ({reason}); export the model again") from None


def read_graph(onnx: Path) -> GraphFile:
    """Read an ONNX file without its weights.

    Raises:
        PpclError: it is missing, is damaged, or its weights are missing or lie outside of its folder.
    """
    from ppcl_fx.export.onnx.writer import ports

    if not onnx.is_file():
        raise PpclError(f"{onnx}: no such file; export the model again")
    graph = load_onnx(onnx).graph
    tensors = [value.const_value for value in graph.initializers.values()]
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[tensor.dtype.name.lower()] += tensor.size
    outside = [tensor for tensor in tensors if isinstance(tensor, need("onnx_ir").ExternalTensor)]
    weights = tuple(dict.fromkeys(str(tensor.location) for tensor in outside))
    for name in weights:
        if not inside(onnx.parent, name).is_file():
            raise PpclError(f"{onnx.parent / name}: no such file, and {onnx.name} has its weights there; export again")
    dtype = counts.most_common(1)[0][0] if counts else "float"
    return GraphFile(ports(graph.inputs), ports(graph.outputs), dtype, weights)


class Origin(BaseModel):
    """What is read of the JSON beside an ONNX file: which mixture it is, and how well the graph was checked."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    keep: float | None = None
    students: list[str] = []
    plan: Plan | None = None
    parity: JsonValue = None
