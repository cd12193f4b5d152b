"""What leaves PyTorch: lowering, ONNX, TensorRT, the runtime. Names are imported when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ppcl_fx._names import lazy

if TYPE_CHECKING:
    from ppcl_fx.export.config import ExportConfig
    from ppcl_fx.export.exporting import ExportResult, export, export_graph
    from ppcl_fx.export.one_graph import Exported
    from ppcl_fx.export.onnx.assemble import Translations
    from ppcl_fx.export.runtime.engine import EngineTransformer
    from ppcl_fx.export.store.manifest import Manifest
    from ppcl_fx.export.tensorrt.build import build_engine
    from ppcl_fx.export.tensorrt.loading import load_engine, refit
    from ppcl_fx.export.tensorrt.manifest import EngineManifest
    from ppcl_fx.export.tensorrt.profiles import Profile
    from ppcl_fx.export.tensorrt.request import BuildConfig, BuildOptions, Origin
    from ppcl_fx.export.verify.gate import compare_artefacts
    from ppcl_fx.export.verify.integrity import check_artefacts
    from ppcl_fx.export.verify.metrics import Agreement, Gate, SamplingAgreement
    from ppcl_fx.export.verify.sampling import SamplingRun
    from ppcl_fx.passes.lowering.complex_to_real import ComplexToReal
    from ppcl_fx.passes.lowering.lowering import DropGuards, Lowered, lower
    from ppcl_fx.passes.lowering.positions import PositionsAsInputs
    from ppcl_fx.passes.lowering.tuples_apart import TuplesApart

_HOME = {
    "Agreement": "ppcl_fx.export.verify.metrics",
    "BuildOptions": "ppcl_fx.export.tensorrt.request",
    "ComplexToReal": "ppcl_fx.passes.lowering.complex_to_real",
    "DropGuards": "ppcl_fx.passes.lowering.lowering",
    "EngineManifest": "ppcl_fx.export.tensorrt.manifest",
    "EngineTransformer": "ppcl_fx.export.runtime.engine",
    "BuildConfig": "ppcl_fx.export.tensorrt.request",
    "ExportConfig": "ppcl_fx.export.config",
    "ExportResult": "ppcl_fx.export.exporting",
    "Exported": "ppcl_fx.export.one_graph",
    "Gate": "ppcl_fx.export.verify.metrics",
    "Lowered": "ppcl_fx.passes.lowering.lowering",
    "Origin": "ppcl_fx.export.tensorrt.request",
    "PositionsAsInputs": "ppcl_fx.passes.lowering.positions",
    "Profile": "ppcl_fx.export.tensorrt.profiles",
    "SamplingAgreement": "ppcl_fx.export.verify.metrics",
    "SamplingRun": "ppcl_fx.export.verify.sampling",
    "Manifest": "ppcl_fx.export.store.manifest",
    "Translations": "ppcl_fx.export.onnx.assemble",
    "TuplesApart": "ppcl_fx.passes.lowering.tuples_apart",
    "build_engine": "ppcl_fx.export.tensorrt.build",
    "check_artefacts": "ppcl_fx.export.verify.integrity",
    "compare_artefacts": "ppcl_fx.export.verify.gate",
    "export": "ppcl_fx.export.exporting",
    "export_graph": "ppcl_fx.export.exporting",
    "load_engine": "ppcl_fx.export.tensorrt.loading",
    "lower": "ppcl_fx.passes.lowering.lowering",
    "refit": "ppcl_fx.export.tensorrt.loading",
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

if not TYPE_CHECKING:
    __getattr__ = lazy(__name__, _HOME)
