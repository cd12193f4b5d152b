"""What leaves PyTorch: lowering, ONNX, TensorRT, the runtime. Names are imported when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ppcl_fx._names import lazy

if TYPE_CHECKING:
    from ppcl_fx.export.config import ExportConfig
    from ppcl_fx.export.exporting import ExportResult, export, export_graph
    from ppcl_fx.export.one_graph import Exported
    from ppcl_fx.export.onnx.segments import Translations
    from ppcl_fx.export.runtime.engine import EngineTransformer
    from ppcl_fx.export.runtime.options import RuntimeOptions
    from ppcl_fx.export.store.manifest import Manifest
    from ppcl_fx.export.tensorrt.build import build_engine
    from ppcl_fx.export.tensorrt.loading import load_engine, refit
    from ppcl_fx.export.tensorrt.manifest import EngineManifest
    from ppcl_fx.export.tensorrt.options import BuildOptions
    from ppcl_fx.export.tensorrt.profiles import Profile
    from ppcl_fx.export.tensorrt.request import BuildConfig, Origin
    from ppcl_fx.export.verify.gate import compare_artefacts
    from ppcl_fx.export.verify.integrity import check_artefacts
    from ppcl_fx.export.verify.metrics import Agreement, Gate, SamplingAgreement
    from ppcl_fx.export.verify.sampling import SamplingRun
    from ppcl_fx.passes.lowering.complex_to_real import ComplexToReal
    from ppcl_fx.passes.lowering.lowering import DropGuards, Lowered, lower
    from ppcl_fx.passes.lowering.positions import PositionsAsInputs
    from ppcl_fx.passes.lowering.tuples_apart import TuplesApart

_HOME = {
    "ppcl_fx.export.config": ("ExportConfig",),
    "ppcl_fx.export.exporting": ("ExportResult", "export", "export_graph"),
    "ppcl_fx.export.one_graph": ("Exported",),
    "ppcl_fx.export.onnx.segments": ("Translations",),
    "ppcl_fx.export.runtime.engine": ("EngineTransformer",),
    "ppcl_fx.export.runtime.options": ("RuntimeOptions",),
    "ppcl_fx.export.store.manifest": ("Manifest",),
    "ppcl_fx.export.tensorrt.build": ("build_engine",),
    "ppcl_fx.export.tensorrt.loading": ("load_engine", "refit"),
    "ppcl_fx.export.tensorrt.manifest": ("EngineManifest",),
    "ppcl_fx.export.tensorrt.options": ("BuildOptions",),
    "ppcl_fx.export.tensorrt.profiles": ("Profile",),
    "ppcl_fx.export.tensorrt.request": ("BuildConfig", "Origin"),
    "ppcl_fx.export.verify.gate": ("compare_artefacts",),
    "ppcl_fx.export.verify.integrity": ("check_artefacts",),
    "ppcl_fx.export.verify.metrics": ("Agreement", "Gate", "SamplingAgreement"),
    "ppcl_fx.export.verify.sampling": ("SamplingRun",),
    "ppcl_fx.passes.lowering.complex_to_real": ("ComplexToReal",),
    "ppcl_fx.passes.lowering.lowering": ("DropGuards", "Lowered", "lower"),
    "ppcl_fx.passes.lowering.positions": ("PositionsAsInputs",),
    "ppcl_fx.passes.lowering.tuples_apart": ("TuplesApart",),
}
"""The names of each module."""

__all__ = [
    "Agreement", "BuildConfig", "BuildOptions", "ComplexToReal", "DropGuards", "EngineManifest",
    "EngineTransformer", "ExportConfig", "ExportResult", "Exported", "Gate", "Lowered", "Manifest",
    "Origin", "PositionsAsInputs", "Profile", "RuntimeOptions", "SamplingAgreement", "SamplingRun", "Translations",
    "TuplesApart", "build_engine", "check_artefacts", "compare_artefacts", "export", "export_graph",
    "load_engine", "lower", "refit",
]

if not TYPE_CHECKING:
    __getattr__ = lazy(__name__, _HOME)
