"""A TensorRT engine for each exported ratio, built from a bfloat16 graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ppcl_fx.export.exporting import Exported
from ppcl_fx.export.inputs import in_type
from ppcl_fx.export.names import engine_path, timings_path, typed_graph_path
from ppcl_fx.export.onnx_file import ports, prepare, write_onnx
from ppcl_fx.export.stitching import Translations
from ppcl_fx.export.tensorrt import Profile, build_engine, default_profile, load_tensorrt

if TYPE_CHECKING:
    from ppcl_fx.calls import Calls
    from ppcl_fx.model import PluggableModel

DTYPE = "bf16"


def build_engines(
    model: PluggableModel, exported: Sequence[Exported], calls: Calls | None, profile: Profile | None
) -> list[Exported]:
    """Build an engine beside each exported ONNX file.

    The types of an ONNX file rule in TensorRT, so each mixture is exported once more with bfloat16 weights. The
    other file is the one that was compared to PyTorch: onnxruntime has no bfloat16 kernels for the CPU.

    Args:
        model: the model.
        exported: its exported ratios.
        calls: as for `ppcl_fx.export.export`.
        profile: ranges of the open sizes; by default around the example.

    Raises:
        PpclError: there is no TensorRT or no GPU (the ONNX files stay), or the model does not build.
    """
    folder = exported[0].onnx.parent if exported else ""
    api, gpu = load_tensorrt(f"the ONNX files stay in {folder}")
    known = Translations()
    results = []
    for ratio in exported:
        model.plug(students=ratio.students)
        prepared = prepare(*in_type(model.graph_module(), calls, torch.bfloat16))
        typed = typed_graph_path(ratio.onnx, DTYPE)
        written = write_onnx(prepared, typed, known)
        inputs = ports(written.graph.inputs)
        chosen = profile or default_profile(inputs, {axis.name: axis.size for axis in prepared.axes})
        engine = engine_path(ratio.onnx, DTYPE)
        cache = timings_path(ratio.onnx)
        build_engine(typed, engine, inputs, chosen, api=api, gpu=gpu, dtype="bfloat16", cache=cache)
        results.append(dataclasses.replace(ratio, engine=engine))
    return results
