"""What is written beside an exported file: where it comes from, what it takes, and how well it was checked."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import JsonValue

from ppcl_fx.export.verify.metrics import Gate
from ppcl_fx.io.files import Record, Sealed, sha256_of
from ppcl_fx.schema.plan import Plan


class Port(Record):
    """An input or an output: name, type, and sizes, where a name stands for a size that may change."""

    name: str
    dtype: str
    shape: list[int | str]


class FileMark(Record):
    """A file by its size in bytes and its hash."""

    bytes: int
    sha256: str


def mark_of(path: Path) -> FileMark:
    """Return the size and hash of a file; one that many graphs share is read once, as long as it does not change."""
    stat = path.stat()
    return _mark(path.resolve(), stat.st_size, (stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns))


@lru_cache(1024)
def _mark(path: Path, size: int, state: tuple[int, ...]) -> FileMark:
    return FileMark(bytes=size, sha256=sha256_of(path))


class WeightFile(Record):
    """A file that holds weights of a graph: its path within the graph's folder, its content, its size in bytes, and
    what `ppcl_fx.export.verify.integrity.sample_of` said of it; older manifests have no such sample.
    """

    file: str
    sha256: str
    size: int
    sample: str | None = None


class HalfPrecision(Record):
    """What is known of a file in bfloat16 or float16 that was compared to PyTorch.

    Attributes:
        compared_in: the type that all of it was widened to for the comparison.
        rounding: relative error of PyTorch in the file's type to PyTorch in float32, on the traced call.
        largest_value: for float16 the largest absolute value on recorded calls.
    """

    compared_in: Literal["float32"] = "float32"
    rounding: float
    largest_value: float | None


class QuantisedWeights(Record):
    """What is known of the weights of a file that are stored in few bits.

    Attributes:
        weights: the type of a stored value: int8, int4 or fp8.
        block: weights of a row that share a scale; None for a whole row.
        layers: linear layers whose weights are stored so.
        kept: of the file's other linear layers, by parameter name, why they are not.
        calls: recorded calls that the rounding was made for.
        added_error: relative error of the output on recorded calls to that of the model as it was, the largest of all;
            it is the reference for everything else in the manifest that has these weights.
        bytes: of all weights of the file, in its store.
    """

    weights: Literal["int8", "int4", "fp8"]
    block: int | None
    layers: int
    kept: dict[str, str]
    calls: int
    added_error: float
    bytes: int


class FileManifest(Record):
    """What the manifests of graphs and of engines have in common: the name of the file, the type of most weights, the
    share of the teacher's parameters asked for, the ids of the edits that are plugged, and the plan they come from.
    """

    version: int
    kind: str
    file: str
    dtype: str
    keep: float | None
    students: list[str]
    plan: Plan | None
    inputs: list[Port]
    outputs: list[Port]


class Manifest(FileManifest, Sealed):
    """The JSON beside an ONNX file.

    Attributes:
        sha256: of the ONNX file; `size` is its own, in bytes.
        weights: the files that hold its weights; other graphs may use them too.
        params: parameters of this mixture, as the plan counts them.
        params_in_file: parameters in the file: those of them that have an effect on the output.
        finetuned: whether all of its weights were trained as one, and none is the teacher's.
        positions: inputs that hold position tables, computed from the call's Python arguments.
        parity: for each shape the largest difference between onnxruntime and PyTorch; empty where unchecked. The
            largest of them is `parity_max_abs`, and `tolerance` was allowed.
        unchecked: what was not checked, and why; None where all was.
        latency_ms: median time of a run in onnxruntime, on the CPU, at the traced shape; None where unchecked or in
            half precision, for which onnxruntime has few kernels there.
        half: what is known of the rounding; None where the file is in float32 or unchecked.
        quantised: what is known of weights in few bits; None where there are none.
        gate: what was compared beyond the shapes, and what was not; None in a manifest of version 2, which had none.
        made: versions and passes.
    """

    version: Literal[2, 3] = 3
    kind: Literal["onnx"] = "onnx"
    sha256: str
    size: int
    weights: list[WeightFile]
    keep: float
    params: int
    params_in_file: int
    finetuned: bool = False
    opset: int
    positions: list[str]
    parity: dict[str, float]
    parity_max_abs: float | None
    unchecked: str | None
    tolerance: float
    latency_ms: float | None
    half: HalfPrecision | None = None
    quantised: QuantisedWeights | None = None
    gate: Gate | None = None
    made: dict[str, JsonValue]
