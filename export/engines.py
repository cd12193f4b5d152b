"""From exported ratios to TensorRT engines: graphs in the engine's type, then the build, here or on another machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ppcl_fx.errors import PpclError
from ppcl_fx.export.exporting import Exported, in_type
from ppcl_fx.export.onnx_file import Prepared, prepare, write_onnx
from ppcl_fx.export.serving import refused
from ppcl_fx.export.stitching import Translations
from ppcl_fx.export.tensorrt import Profile, build_engine, default_profile, load_tensorrt
from ppcl_fx.export.tensorrt.places import TIMINGS, find_graphs, read_graph, read_origin, typed_file
from ppcl_fx.export.tensorrt.request import BuildRequest

if TYPE_CHECKING:
    from ppcl_fx.calls import Calls
    from ppcl_fx.model import PluggableModel


def write_typed(
    model: PluggableModel, exported: Sequence[Exported], calls: Calls | None, request: BuildRequest | None = None
) -> dict[str, int]:
    """Export each ratio once more with bfloat16 weights, for TensorRT.

    The types of an ONNX file rule in TensorRT. The float32 file is the one that was compared to PyTorch: onnxruntime
    has no bfloat16 kernels for the CPU.

    Args:
        model: the model; its mixture is another one afterwards.
        exported: its exported ratios.
        calls: as for `ppcl_fx.export.export`.
        request: what is to be built: sizes that the model does not take are refused here, where the model is.

    Returns:
        The sizes of the example, by the names of the open sizes.

    Raises:
        PpclError: a graph cannot be exported, or does not serve a profile.
    """
    known = Translations()
    sizes: dict[str, int] = {}
    for ratio in exported:
        model.plug(students=ratio.students)
        prepared = prepare(*in_type(model.graph_module(), calls, torch.bfloat16))
        sizes = {axis.name: axis.size for axis in prepared.axes}
        if request is not None and ratio is exported[0]:
            _check_served(prepared, request.model_copy(update={"example": sizes}), ratio.onnx)
        write_onnx(prepared, typed_file(ratio.onnx), known)
    return sizes


def _check_served(prepared: Prepared, request: BuildRequest, onnx: Path) -> None:
    """Refuse a profile whose largest or smallest sizes the model does not take."""
    for profile in request.profiles(read_graph(onnx), str(onnx)):
        for sizes in (
            {name: size.max for name, size in profile.sizes.items()},
            {name: size.min for name, size in profile.sizes.items()},
        ):
            reason = refused(prepared, sizes)
            if reason is not None:
                raise PpclError(f"profile {profile.name or 'of the options'}: {reason}; give another range")


def build_engines(
    model: PluggableModel, exported: Sequence[Exported], calls: Calls | None, profile: Profile | None
) -> list[Exported]:
    """Build an engine beside each exported ONNX file.

    Args:
        model: the model.
        exported: its exported ratios.
        calls: as for `ppcl_fx.export.export`.
        profile: ranges of the open sizes; by default around the example.

    Raises:
        PpclError: there is no TensorRT or no GPU (the ONNX files stay), or the model does not build.
    """
    folder = exported[0].onnx.parent.parent if exported else ""
    api, gpu = load_tensorrt(f"the ONNX files stay in {folder}")
    sizes = write_typed(model, exported, calls)
    places = {place.onnx: place for place in find_graphs(folder)}
    results = []
    for ratio in exported:
        place = places[typed_file(ratio.onnx)]
        chosen = profile or default_profile(read_graph(place.onnx).inputs, sizes)
        build_engine(
            place.onnx,
            place.engine,
            [chosen],
            api=api,
            gpu=gpu,
            cache=place.root / TIMINGS,
            origin=read_origin(place),
        )
        results.append(dataclasses.replace(ratio, engine=place.engine))
    return results
