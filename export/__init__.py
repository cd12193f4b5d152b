"""What leaves PyTorch: lowering, ONNX, TensorRT, the runtime. Names are imported when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppcl_fx.export.complex_to_real import ComplexToReal
    from ppcl_fx.export.config import ExportConfig
    from ppcl_fx.export.exporting import ExportResult, export, export_graph
    from ppcl_fx.export.gate import compare_artefacts
    from ppcl_fx.export.integrity import check_artefacts
    from ppcl_fx.export.lowering import DropGuards, Lowered, lower
    from ppcl_fx.export.manifest import Manifest
    from ppcl_fx.export.metrics import Agreement, Gate, SamplingAgreement
    from ppcl_fx.export.one_graph import Exported
    from ppcl_fx.export.positions import PositionsAsInputs
    from ppcl_fx.export.runtime import EngineTransformer
    from ppcl_fx.export.sampling import SamplingRun
    from ppcl_fx.export.stitching import Translations
    from ppcl_fx.export.tensorrt import (
        BuildOptions,
        EngineManifest,
        Profile,
        build_engine,
        load_engine,
        refit,
    )
    from ppcl_fx.export.tensorrt.places import Origin
    from ppcl_fx.export.tensorrt.request import BuildConfig
    from ppcl_fx.export.tuples_apart import TuplesApart

_HOME = {
    "Agreement": "metrics",
    "BuildOptions": "tensorrt",
    "ComplexToReal": "complex_to_real",
    "DropGuards": "lowering",
    "EngineManifest": "tensorrt",
    "EngineTransformer": "runtime",
    "BuildConfig": "tensorrt.request",
    "ExportConfig": "config",
    "ExportResult": "exporting",
    "Exported": "one_graph",
    "Gate": "metrics",
    "Lowered": "lowering",
    "Origin": "tensorrt.places",
    "PositionsAsInputs": "positions",
    "Profile": "tensorrt",
    "SamplingAgreement": "metrics",
    "SamplingRun": "sampling",
    "Manifest": "manifest",
    "Translations": "stitching",
    "TuplesApart": "tuples_apart",
    "build_engine": "tensorrt",
    "check_artefacts": "integrity",
    "compare_artefacts": "gate",
    "export": "exporting",
    "export_graph": "exporting",
    "load_engine": "tensorrt",
    "lower": "lowering",
    "refit": "tensorrt",
}

__all__ = [
    "Agreement",
    "BuildConfig",
    "BuildOptions",
    "ComplexToReal",
    "DropGuards",
    "EngineManifest",
    "EngineTransformer",
    "ExportConfig",
    "ExportResult",
    "Exported",
    "Gate",
    "Lowered",
    "Manifest",
    "Origin",
    "PositionsAsInputs",
    "Profile",
    "SamplingAgreement",
    "SamplingRun",
    "Translations",
    "TuplesApart",
    "build_engine",
    "check_artefacts",
    "compare_artefacts",
    "export",
    "export_graph",
    "load_engine",
    "lower",
    "refit",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"ppcl_fx.export.{_HOME[name]}"), name)
