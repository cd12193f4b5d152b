"""TensorRT engines: built from ONNX files, described by a manifest, loaded and refitted.

Names are imported when they are first used, so that checking options does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ppcl_fx._names import lazy

if TYPE_CHECKING:
    from ppcl_fx.export.tensorrt.build import build_engine, load_tensorrt
    from ppcl_fx.export.tensorrt.loading import LoadedEngine, load_engine, refit
    from ppcl_fx.export.tensorrt.manifest import EngineManifest, Hashes, check_card, read_card
    from ppcl_fx.export.tensorrt.options import BuildOptions
    from ppcl_fx.export.tensorrt.places import find_graphs, read_graph
    from ppcl_fx.export.tensorrt.profiles import Profile, Range, Spec, default_profile, resolve

_HOME = {
    "BuildOptions": "ppcl_fx.export.tensorrt.options",
    "EngineManifest": "ppcl_fx.export.tensorrt.manifest",
    "Hashes": "ppcl_fx.export.tensorrt.manifest",
    "LoadedEngine": "ppcl_fx.export.tensorrt.loading",
    "Profile": "ppcl_fx.export.tensorrt.profiles",
    "Range": "ppcl_fx.export.tensorrt.profiles",
    "Spec": "ppcl_fx.export.tensorrt.profiles",
    "build_engine": "ppcl_fx.export.tensorrt.build",
    "check_card": "ppcl_fx.export.tensorrt.manifest",
    "default_profile": "ppcl_fx.export.tensorrt.profiles",
    "find_graphs": "ppcl_fx.export.tensorrt.places",
    "load_engine": "ppcl_fx.export.tensorrt.loading",
    "load_tensorrt": "ppcl_fx.export.tensorrt.build",
    "read_card": "ppcl_fx.export.tensorrt.manifest",
    "read_graph": "ppcl_fx.export.tensorrt.places",
    "refit": "ppcl_fx.export.tensorrt.loading",
    "resolve": "ppcl_fx.export.tensorrt.profiles",
}

__all__ = [
    "BuildOptions",
    "EngineManifest",
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

if not TYPE_CHECKING:
    __getattr__ = lazy(__name__, _HOME)
