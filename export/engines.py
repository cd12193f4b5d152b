"""From exported ratios to TensorRT engines: graphs in the engine's type, then the build, here or on another machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ppcl_fx.errors import PpclError
from ppcl_fx.export.claim import claimed
from ppcl_fx.export.exporting import write_graphs
from ppcl_fx.export.gate import GateOptions
from ppcl_fx.export.inputs import in_type
from ppcl_fx.export.names import TIMINGS, manifest_path, typed_graph_path
from ppcl_fx.export.one_graph import Exported, Mixture
from ppcl_fx.export.onnx_file import Prepared, prepare
from ppcl_fx.export.opened import MEMORY, Opened
from ppcl_fx.export.serving import refused
from ppcl_fx.export.sidecar import Sidecar
from ppcl_fx.export.tensorrt import Hashes, Profile, build_engine, default_profile, load_tensorrt
from ppcl_fx.export.tensorrt.places import find_graphs, read_graph, read_origin
from ppcl_fx.export.tensorrt.request import BuildRequest
from ppcl_fx.files import read_json

if TYPE_CHECKING:
    from ppcl_fx.calls import Calls
    from ppcl_fx.export.weight_source import WeightFolder
    from ppcl_fx.model import PluggableModel


def write_typed(
    model: PluggableModel | WeightFolder,
    exported: Sequence[Exported],
    calls: Calls | None,
    request: BuildRequest | None = None,
    memory_limit: int = MEMORY,
    tolerance: float = 1e-4,
    gate: GateOptions | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, int]:
    """Export each ratio that is in float32 once more in bfloat16, for TensorRT, over one converted copy of the weights.

    The types of an ONNX file rule in TensorRT. A ratio that was exported in another type is built as it is.

    Args:
        model: the model; its mixture is another one afterwards.
        exported: its exported ratios.
        calls: as for `ppcl_fx.export.export`.
        request: what is to be built: sizes that the model does not take are refused here, where the model is.
        memory_limit: as for `ppcl_fx.export.export`.
        tolerance: as for `ppcl_fx.export.export`.
        gate: what is compared beyond the shapes.
        note: told in one line what was converted.

    Returns:
        The sizes of the example, by the names of the open sizes.

    Raises:
        PpclError: a graph cannot be exported, or does not serve a profile.
    """
    opened = Opened.of(model, memory_limit, torch.bfloat16)
    graphs = [opened.model.plug(students=ratio.students).graph_module() for ratio in exported]
    prepared = prepare(*in_type(graphs[0], calls, None))
    sizes = {axis.name: axis.size for axis in prepared.axes}
    if request is not None:
        _check_served(prepared, request.model_copy(update={"example": sizes}), exported[0].onnx)
    mixtures = [
        Mixture(gm, ratio.keep, ratio.students, typed_graph_path(ratio.onnx), calls, opened.unchecked)
        for gm, ratio in zip(graphs, exported, strict=True)
        if read_json(manifest_path(ratio.onnx), Sidecar).dtype == "float32"
    ]
    if mixtures:
        folder = exported[0].onnx.parent
        with claimed(folder, [mixture.path for mixture in mixtures]):
            write_graphs(
                opened,
                mixtures,
                folder,
                dtype=torch.bfloat16,
                tolerance=tolerance,
                axes=prepared.axes,
                gate=gate,
                note=note,
            )
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
    model: PluggableModel | WeightFolder,
    exported: Sequence[Exported],
    calls: Calls | None,
    profile: Profile | None,
    memory_limit: int = MEMORY,
    tolerance: float = 1e-4,
    gate: GateOptions | None = None,
) -> list[Exported]:
    """Build an engine beside each exported ONNX file.

    Args:
        model: the model.
        exported: its exported ratios.
        calls: as for `ppcl_fx.export.export`.
        profile: ranges of the open sizes; by default around the example.
        memory_limit: as for `ppcl_fx.export.export`.
        tolerance: as for `ppcl_fx.export.export`.
        gate: what is compared beyond the shapes.

    Raises:
        PpclError: there is no TensorRT or no GPU (the ONNX files stay), or the model does not build.
    """
    folder = exported[0].onnx.parent if exported else Path()
    api, gpu = load_tensorrt(f"the ONNX files stay in {folder}")
    sizes = write_typed(model, exported, calls, memory_limit=memory_limit, tolerance=tolerance, gate=gate)
    places = {place.name: place for place in find_graphs(folder)}
    hashes, results = Hashes(), []
    for ratio in exported:
        place = places[ratio.onnx.stem]
        chosen = profile or default_profile(read_graph(place.onnx).inputs, sizes)
        build_engine(
            place.onnx,
            place.engine,
            [chosen],
            api=api,
            gpu=gpu,
            cache=place.root / TIMINGS,
            origin=read_origin(place),
            hashes=hashes,
        )
        results.append(dataclasses.replace(ratio, engine=place.engine))
    return results
