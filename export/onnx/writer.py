"""One graph to one checked ONNX file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

from ppcl_fx.errors import PpclError
from ppcl_fx.export.extras import check_export, need
from ppcl_fx.export.onnx.dynamic_axes import Axis, find_axes, resized, still_fit, variants, widened
from ppcl_fx.export.onnx.graph_run import Seen, run_graph
from ppcl_fx.export.store.manifest import Port
from ppcl_fx.export.store.names import data_path
from ppcl_fx.export.store.weight_source import state
from ppcl_fx.export.verify.metrics import difference
from ppcl_fx.export.verify.onnx_runner import run, session
from ppcl_fx.io.files import need_room
from ppcl_fx.passes.lowering.lowering import Lowered, lower

if TYPE_CHECKING:
    from ppcl_fx.export.onnx.assemble import Initial

LARGE = 1 << 30
"""Bytes of weights above which a self-contained graph has them in a file beside it: protobuf ends at 2 GiB."""


@dataclass(frozen=True)
class Prepared:
    """A graph, lowered, with the calls it is to be checked on.

    Attributes:
        gm: the graph as it was, guards included: the reference.
        lowered: the graph ready for export.
        axes: the sizes that may change.
        calls: arguments by the name of their shape; ``traced`` is the example.
    """

    gm: GraphModule
    lowered: Lowered
    axes: tuple[Axis, ...]
    calls: dict[str, dict[str, Any]]


def prepare(
    gm: GraphModule, kwargs: dict[str, Any], batch: int, found: Sequence[Axis] | None = None
) -> Prepared:
    """Lower a graph and find the shapes it can be called with.

    Args:
        gm: a student's graph, on the CPU, or with its parameters on the meta device.
        kwargs: the arguments of one call, by the names of the graph's inputs, on the same device.
        batch: samples in that call.
        found: sizes that may change in another mixture of the same model, tried first: together, once.

    Raises:
        PpclError: the graph cannot be lowered, or takes one batch size only.
    """
    lowered = lower(gm)
    example = widened(kwargs, batch)
    if found is not None and still_fit(gm, example, found):
        axes = list(found)
    else:
        axes = find_axes(gm, lowered.graph, example, max(batch, 2))
    example, axes = _without_ones(lowered, example, axes)
    return Prepared(gm, lowered, tuple(axes), variants(example, axes))


def _without_ones(
    lowered: Lowered, example: dict[str, Any], axes: Sequence[Axis]
) -> tuple[dict[str, Any], list[Axis]]:
    """Give those axes their other size in the example that make a size inside the graph one, as a single patch does:
    translation takes a one for a constant.
    """

    def sizes(kwargs: dict[str, Any]) -> dict[Any, Seen]:
        return run_graph(lowered.graph, lowered.feeds(kwargs))[1]

    seen, chosen = sizes(example), []
    for axis in axes:
        larger = resized(example, axis)
        others = sizes(larger)
        if any(a == 1 < b for node in seen for a, b in zip(seen[node][0], others[node][0], strict=True)):
            example, seen, axis = larger, others, axis.turned()
        chosen.append(axis)
    return example, chosen


def translated(prepared: Prepared, known: Any, initial: Initial | None = None) -> Any:
    """Translate a prepared graph into an `onnx_ir.Model`, and fuse what engines have one kernel for.

    Args:
        prepared: the graph.
        known: a `ppcl_fx.export.onnx.assemble.Translations`, shared by the graphs of one model.
        initial: gives what holds the values of each parameter; by default the parameters themselves.

    Raises:
        PpclError: a library is missing, or a part of the graph cannot be translated.
    """
    check_export()
    from ppcl_fx.export.fusing import fuse
    from ppcl_fx.export.onnx.assemble import ROWS, held, observed, stitch

    def seen(name: str) -> dict[Any, Seen]:
        return run_graph(prepared.lowered.graph, prepared.lowered.feeds(prepared.calls[name]))[1]

    shapes = observed(seen("traced"), {axis.name: seen(f"{axis.name}={axis.other}") for axis in prepared.axes})
    gm = prepared.lowered.graph
    model = stitch(gm, shapes, known, initial=initial or held)
    own = state(gm)
    fuse(model, {name for name in model.graph.initializers if name in own or name.rpartition(ROWS)[0] in own})
    return model


def save(model: Any, path: Path, *, embed: bool) -> Path | None:
    """Write a model and let `onnx.checker` look at it.

    Args:
        model: the `onnx_ir.Model`.
        path: the file to write.
        embed: write the weights too: into the same file, or where they are `LARGE` into ``path.data``. Else the model
            says where they lie.

    Returns:
        The file of the weights, where they have one of their own.

    Raises:
        PpclError: the checker refuses the file, or it cannot be written.
    """
    import onnx_ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    data = data_path(path) if embed and size > LARGE else None
    if embed:
        need_room(path.parent, size)
    try:
        onnx_ir.save(model, path, external_data=data.name if data is not None else None)
    except OSError as error:
        reason = error.strerror or str(error)
        raise PpclError(f"{path}: cannot be written ({reason}); choose a writable place with room") from error
    onnx = need("onnx")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).splitlines()[0]
        raise PpclError(f"{path.name}: onnx.checker refuses it ({reason}); nothing was kept") from error
    return data


def compare(prepared: Prepared, path: Path) -> tuple[dict[str, float], Any]:
    """Run a file in onnxruntime on every shape and compare it to PyTorch.

    Returns:
        The largest difference for each shape by name, and the open session.
    """
    running = session(path)
    found = {}
    for name, kwargs in prepared.calls.items():
        expected = run_graph(prepared.gm, kwargs)[0]
        found[name] = difference(run(running, prepared.lowered.feeds(kwargs)), expected)
    return found, running


def ports(values: Any) -> list[Port]:
    """Describe the inputs or outputs of an `onnx_ir.Graph`."""
    return [
        Port(
            name=value.name,
            dtype=value.dtype.name.lower(),
            shape=[size if isinstance(size, int) else str(size.value) for size in value.shape],
        )
        for value in values
    ]


def parameters_in(model: Any, gm: GraphModule) -> int:
    """Count the elements of those initializers that are parameters of the graph."""
    from ppcl_fx.export.onnx.assemble import ROWS

    names = {name for name, _ in gm.named_parameters(remove_duplicate=False)}
    held = {name: value.const_value.size for name, value in model.graph.initializers.items()}
    return sum(size for name, size in held.items() if name.rpartition(ROWS)[0] in names or name in names)


def floats_as(kwargs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return a call with its floating-point tensors in another type, as a pipeline of that type passes them.

    Numbers and lists of numbers never become narrower: a pipeline may pass timesteps in float32 beside bfloat16 latents
    (SD3's does), and bfloat16 makes 988 of 987.65. A model that wants them narrower converts them itself.
    """
    return {
        name: _as(value, dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in kwargs.items()
    }


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype if tensor.ndim > 1 else torch.promote_types(tensor.dtype, dtype))
