"""What the files of an export are called. Everything that writes or opens them asks here."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = "weights"
"""Folder of the shared weights, where they cannot stay where they are."""

TIMINGS = "timing.cache"
"""TensorRT's kernel timings, shared by all ratios."""


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
    return graph.with_name(f"{graph.name}.data")


def typed_graph_path(graph: Path, dtype: str) -> Path:
    """Return where the graph that an engine is built from lies: ``OUT/keep-0.7.bf16.onnx``."""
    return graph.with_name(f"{graph.stem}.{dtype}.onnx")


def engine_path(graph: Path, dtype: str) -> Path:
    """Return where the engine of a graph lies: ``OUT/keep-0.7.bf16.engine``."""
    return graph.with_name(f"{graph.stem}.{dtype}.engine")


def timings_path(graph: Path) -> Path:
    """Return where TensorRT's kernel timings lie."""
    return graph.with_name(TIMINGS)
