"""What the files of an export are called. Everything that writes or opens them asks here."""

from __future__ import annotations

import re
from pathlib import Path

WEIGHTS = "weights"
"""Folder of the shared weights, where they cannot stay where they are."""

TIMINGS = "timing.cache"
"""TensorRT's kernel timings, shared by all ratios."""

DATA = ".onnx.data"
"""What the file of a self-contained graph's weights ends in, where they are too large for the graph's own."""

_RATIO = re.compile(r"keep-([0-9]*\.?[0-9]+)")


def ratio_name(keep: float) -> str:
    """Return what the files of a ratio begin with: ``keep-0.7``."""
    return f"keep-{keep:g}"


def graph_path(folder: str | Path, name: str) -> Path:
    """Return where a graph lies: ``OUT/keep-0.7.onnx``."""
    return Path(folder) / f"{name}.onnx"


def manifest_path(graph: Path) -> Path:
    """Return where the manifest of a graph lies: ``OUT/keep-0.7.json``."""
    return graph.with_name(f"{graph.stem}.json")


def data_path(graph: Path) -> Path:
    """Return where the weights of a self-contained graph lie that is too large for one file."""
    return graph.with_name(f"{graph.stem}{DATA}")


def typed_graph_path(graph: Path) -> Path:
    """Return where a float32 graph lies once more in bfloat16, for an engine: ``OUT/keep-0.7.bf16.onnx``."""
    return graph.with_name(f"{graph.stem}.bf16.onnx")


def engine_path(graph: Path) -> Path:
    """Return where the engine built from a graph lies: ``OUT/keep-0.7.bf16.engine``."""
    return graph.with_suffix(".engine")


def engine_manifest_path(engine: Path) -> Path:
    """Return where the manifest of an engine lies: ``OUT/keep-0.7.bf16.engine.json``."""
    return engine.with_name(f"{engine.name}.json")


def kernel_cache_path(engine: Path) -> Path:
    """Return where the kernels that a card compiled of an RTX engine lie: ``OUT/keep-0.7.bf16.engine.cache``."""
    return engine.with_name(f"{engine.name}.cache")


def ratio_of(graph: Path) -> float | None:
    """Return the ratio that a graph or its manifest is called by; None for a graph in another type, or another file."""
    found = _RATIO.fullmatch(graph.stem)
    return None if found is None else float(found[1])
