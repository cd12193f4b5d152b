"""One graph to one checked ONNX file: the call it is exported with, its type, lowering, translation, the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node

from ppcl_fx.calls.examples import floats_as
from ppcl_fx.errors import PpclError
from ppcl_fx.export.extras import check_export, need
from ppcl_fx.export.onnx.dynamic_axes import Axis, find_axes, resized, variants, widened
from ppcl_fx.export.onnx.graph_run import Seen, run_graph
from ppcl_fx.export.store.manifest import Port
from ppcl_fx.export.store.names import data_path
from ppcl_fx.export.store.weight_source import weightless
from ppcl_fx.io.files import need_room
from ppcl_fx.ir.dtypes import main_dtype
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.model.retrace import is_loaded_as, loaded_as
from ppcl_fx.passes.lowering.lowering import Lowered, lower
from ppcl_fx.tracing import bind

if TYPE_CHECKING:
    from ppcl_fx.calls.store import Calls
    from ppcl_fx.export.onnx.assemble import Initial
    from ppcl_fx.export.onnx.attention import AttentionForm
    from ppcl_fx.export.onnx.segments import Translations
    from ppcl_fx.schema.plan import Plan

LARGE = 1 << 30
"""Bytes of weights above which a self-contained graph has them in a file beside it: protobuf ends at 2 GiB."""


def call_of(gm: GraphModule, calls: Calls | None) -> tuple[dict[str, Any], int]:
    """Return the arguments of one call of a graph, on the device of its parameters, and the samples in it.

    They are in the graph's type, as a pipeline of that type passes them, and come from where `example` says.
    """
    kwargs, batch = example(gm, calls)
    kwargs = floats_as(kwargs, main_dtype(gm))
    place = "meta" if weightless(gm) else "cpu"
    return {name: v.to(place) if isinstance(v, torch.Tensor) else v for name, v in kwargs.items()}, batch


def in_type(
    gm: GraphModule, plan: Plan, dtype: torch.dtype | None, calls: Calls | None
) -> GraphModule | None:
    """Return a graph as its model is in another type (`loaded_as`), without weights.

    Args:
        gm: a traced graph, a pluggable one, or a mixture of one.
        plan: the plan of a pluggable graph.
        dtype: the type; None for the graph's own.
        calls: where the call for a new trace comes from, see `example`.

    Returns:
        The graph; None where `gm` is of that type already.

    Raises:
        PpclError: the model cannot be traced again in that type.
    """
    if dtype is None or is_loaded_as(gm, dtype):
        return None
    return loaded_as(gm, plan, dtype, example(gm, calls)[0] if calls is not None else None)


def example(gm: GraphModule, calls: Calls | None) -> tuple[dict[str, Any], int]:
    """Return the arguments of one call of a graph and the samples in it; without calls random ones, as in the trace.

    Raises:
        PpclError: there are no calls in `calls`, or the first lies outside of what was traced.
    """
    if calls is not None:
        if len(calls) == 0:
            raise PpclError("there are no calls to take an example from; record some")
        wanted = set(graph_info(gm)["inputs"])
        # One that has every argument by itself, where there is one.
        call = next((call for call in calls if wanted <= call.kwargs.keys()), calls[0])
        return bind(gm, call.kwargs), call.batch
    generator = torch.Generator().manual_seed(0)
    kwargs: dict[str, Any] = {str(node.target): node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")}
    for name, like in kwargs.items():
        if isinstance(like, torch.Tensor) and like.is_floating_point():
            kwargs[name] = torch.rand(like.shape, generator=generator).to(like.dtype)
        elif isinstance(like, torch.Tensor):
            kwargs[name] = torch.ones(like.shape, dtype=like.dtype)
    first = [v.shape[0] for v in kwargs.values() if isinstance(v, torch.Tensor) and v.ndim]
    return kwargs, Counter(first).most_common(1)[0][0]


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
        found: as `find_axes` takes it.

    Raises:
        PpclError: the graph cannot be lowered, or takes one batch size only.
    """
    lowered = lower(gm)
    example = widened(kwargs, batch)
    axes = find_axes(gm, lowered.graph, example, max(batch, 2), found)
    example, axes = _without_ones(lowered, example, axes)
    return Prepared(gm, lowered, tuple(axes), variants(example, axes))


def _seen(lowered: Lowered, kwargs: dict[str, Any]) -> dict[Node, Seen]:
    return run_graph(lowered.graph, lowered.feeds(kwargs))[1]


def _without_ones(
    lowered: Lowered, example: dict[str, Any], axes: Sequence[Axis]
) -> tuple[dict[str, Any], list[Axis]]:
    """Give those axes their other size in the example that make a size inside the graph one, as a single patch does:
    translation takes a one for a constant.
    """
    seen, chosen = _seen(lowered, example), []
    for axis in axes:
        larger = resized(example, axis)
        others = _seen(lowered, larger)
        if any(a == 1 < b for node in seen for a, b in zip(seen[node][0], others[node][0], strict=True)):
            example, seen, axis = larger, others, axis.turned()
        chosen.append(axis)
    return example, chosen


def translated(
    prepared: Prepared, known: Translations, initial: Initial | None = None, attention: AttentionForm = "auto"
) -> Any:
    """Translate a prepared graph into an `onnx_ir.Model`, and fuse what engines have one kernel for.

    Args:
        prepared: the graph.
        known: shared by the graphs of one model.
        initial: gives what holds the values of each parameter; by default the parameters themselves.
        attention: how attention is written.

    Raises:
        PpclError: a library is missing, or a part of the graph cannot be translated.
    """
    check_export()
    from ppcl_fx.export.fusing import fuse
    from ppcl_fx.export.onnx.assemble import Shapes, held, stitch

    lowered, calls = prepared.lowered, prepared.calls
    others = {axis.name: _seen(lowered, calls[f"{axis.name}={axis.other}"]) for axis in prepared.axes}
    model = stitch(lowered.graph, Shapes(_seen(lowered, calls["traced"]), others), known, initial or held, attention)
    fuse(model)
    return model


def save(model: Any, path: Path, *, embed: bool) -> Path | None:
    """Write a model and let `onnx.checker` look at it.

    Args:
        model: the `onnx_ir.Model`; it says where the weights lie if they are not embedded.
        path: the file to write.
        embed: write the weights too: into the same file, or where they are `LARGE` into ``path.data``.

    Returns:
        The file of the weights, where they have one of their own.

    Raises:
        PpclError: the checker refuses the file, or it cannot be written.
    """
    import onnx_ir

    size = weight_bytes(model)
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


def weight_bytes(model: Any) -> int:
    """Return the bytes of all weights of an `onnx_ir.Model`, wherever they lie."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values())


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


def weights_in(model: Any) -> set[str]:
    """Return the names of a model's weights, those that are put together of rows by the name of the whole."""
    from ppcl_fx.export.onnx.assemble import ROWS

    return {name.partition(ROWS)[0] for name in model.graph.initializers}
