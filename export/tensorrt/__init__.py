"""TensorRT engines: built from ONNX files, described by a manifest, loaded and refitted."""

from __future__ import annotations

from ppcl_fx.export.tensorrt.build import build_engine, load_tensorrt
from ppcl_fx.export.tensorrt.loading import LoadedEngine, load_engine, refit
from ppcl_fx.export.tensorrt.manifest import EngineCard, Hashes, check_card, read_card
from ppcl_fx.export.tensorrt.options import BuildOptions
from ppcl_fx.export.tensorrt.places import find_graphs, read_graph
from ppcl_fx.export.tensorrt.profiles import Profile, Range, Spec, default_profile, resolve

__all__ = [
    "BuildOptions",
    "EngineCard",
    "Hashes",
    "LoadedEngine",
    "Profile",
    "Range",
    "Spec",
    "build_engine",
    "check_card",
    "default_profile",
    "find_graphs",
    "load_engine",
    "load_tensorrt",
    "read_card",
    "read_graph",
    "refit",
    "resolve",
]
