"""Graphs in the type that TensorRT engines are built in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ppcl_fx.errors import PpclError
from ppcl_fx.export.claim import claimed
from ppcl_fx.export.inputs import in_type
from ppcl_fx.export.names import manifest_path, typed_graph_path
from ppcl_fx.export.one_graph import Exported, Job, Mixture, write_graphs
from ppcl_fx.export.onnx_file import Prepared, prepare
from ppcl_fx.export.opened import Opened
from ppcl_fx.export.serving import refused
from ppcl_fx.export.sidecar import Sidecar
from ppcl_fx.export.tensorrt.places import read_graph
from ppcl_fx.export.tensorrt.request import BuildConfig
from ppcl_fx.files import read_json

if TYPE_CHECKING:
    from ppcl_fx.calls import Calls
    from ppcl_fx.export.weight_source import WeightFolder
    from ppcl_fx.model import PluggableModel


def write_typed(
    model: PluggableModel | WeightFolder, exported: Sequence[Exported], job: Job, calls: Calls | None
) -> dict[str, int]:
    """Export each ratio that is in float32 once more in bfloat16, for TensorRT, over one converted copy of the weights.

    The types of an ONNX file rule in TensorRT. A ratio that was exported in another type is built as it is. Sizes to
    build for that the model does not take are refused here, where the model is.

    Args:
        model: the model; its mixture is another one afterwards.
        exported: its exported ratios.
        job: what was asked of the export.
        calls: recorded calls.

    Returns:
        The sizes of the example, by the names of the open sizes.

    Raises:
        PpclError: a graph cannot be exported, or does not serve a profile.
    """
    config = job.config.model_copy(update={"dtype": "bf16", "embed": False})
    opened = Opened.of(model, config)
    graphs = [opened.model.plug(students=ratio.students).graph_module() for ratio in exported]
    prepared = prepare(*in_type(graphs[0], calls, None))
    sizes = {axis.name: axis.size for axis in prepared.axes}
    _check_served(prepared, config.build.model_copy(update={"example": sizes}), exported[0].onnx)
    mixtures = [
        Mixture(gm, ratio.keep, ratio.students, typed_graph_path(ratio.onnx), calls, opened.unchecked)
        for gm, ratio in zip(graphs, exported, strict=True)
        if read_json(manifest_path(ratio.onnx), Sidecar).dtype == "float32"
    ]
    if mixtures:
        folder = exported[0].onnx.parent
        with claimed(folder, [mixture.path for mixture in mixtures]):
            typed = dataclasses.replace(job, config=config, step=lambda: None)
            write_graphs(opened, mixtures, folder, typed, axes=prepared.axes)
    return sizes


def _check_served(prepared: Prepared, request: BuildConfig, onnx: Path) -> None:
    """Refuse a profile whose largest or smallest sizes the model does not take."""
    for profile in request.profiles(read_graph(onnx), str(onnx)):
        for sizes in (
            {name: size.max for name, size in profile.sizes.items()},
            {name: size.min for name, size in profile.sizes.items()},
        ):
            reason = refused(prepared, sizes)
            if reason is not None:
                raise PpclError(f"profile {profile.name or 'of the options'}: {reason}; give another range")
