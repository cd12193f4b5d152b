"""TensorRT engines: built from ONNX files, described by a manifest, loaded and refitted.

Names are imported when they are first used, so that checking options does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ppcl_fx.errors import near

if TYPE_CHECKING:
    from ppcl_fx.export.tensorrt.build import build_engine, load_tensorrt
    from ppcl_fx.export.tensorrt.loading import LoadedEngine, load_engine, refit
    from ppcl_fx.export.tensorrt.manifest import EngineManifest, Hashes, check_card, read_card
    from ppcl_fx.export.tensorrt.options import BuildOptions
    from ppcl_fx.export.tensorrt.places import find_graphs, read_graph
    from ppcl_fx.export.tensorrt.profiles import Profile, Range, Spec, default_profile, resolve

_HOME = {
    "BuildOptions": "options",
    "EngineManifest": "manifest",
    "Hashes": "manifest",
    "LoadedEngine": "loading",
    "Profile": "profiles",
    "Range": "profiles",
    "Spec": "profiles",
    "build_engine": "build",
    "check_card": "manifest",
    "default_profile": "profiles",
    "find_graphs": "places",
    "load_engine": "loading",
    "load_tensorrt": "build",
    "read_card": "manifest",
    "read_graph": "places",
    "refit": "loading",
    "resolve": "profiles",
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

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first used (PEP 562)."""
        home = _HOME.get(name)
        if home is None:
            raise AttributeError(f"module 'ppcl_fx.export.tensorrt' has no attribute {name!r}{near(name, __all__)}")
        value = getattr(importlib.import_module(f"ppcl_fx.export.tensorrt.{home}"), name)
        globals()[name] = value
        return value
