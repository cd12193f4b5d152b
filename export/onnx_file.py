"""One graph to one checked ONNX file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from ppcl_fx.errors import PpclError
from ppcl_fx.export.axes import Axis, find_axes, variants, widened
from ppcl_fx.export.extras import check_export, need
from ppcl_fx.export.graph_run import Seen, run_graph
from ppcl_fx.export.lowering import Lowered, lower
from ppcl_fx.export.parity import difference, run, session
from ppcl_fx.export.sidecar import Port


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


def prepare(gm: GraphModule, kwargs: dict[str, Any], batch: int) -> Prepared:
    """Lower a graph and find the shapes it can be called with.

    Args:
        gm: a student's graph, on the CPU.
        kwargs: the arguments of one call, by the names of the graph's inputs.
        batch: samples in that call.

    Raises:
        PpclError: the graph cannot be lowered, or takes one batch size only.
    """
    lowered = lower(gm)
    example = widened(kwargs, batch)
    axes = find_axes(gm, lowered.graph, example, max(batch, 2))
    return Prepared(gm, lowered, tuple(axes), variants(example, axes))


def write_onnx(prepared: Prepared, path: Path, known: Any) -> Any:
    """Translate a prepared graph, fuse it, write it with its weights beside it, and let `onnx.checker` look at it.

    Args:
        prepared: the graph.
        path: the file to write; the weights go to ``path.data``.
        known: a `ppcl_fx.export.stitching.Translations`, shared by the graphs of one model.

    Returns:
        The `onnx_ir.Model`.

    Raises:
        PpclError: a library is missing, or a part of the graph cannot be translated.
    """
    check_export()
    import onnx_ir

    from ppcl_fx.export.fusing import fuse
    from ppcl_fx.export.stitching import observed, stitch

    def seen(name: str) -> dict[Any, Seen]:
        return run_graph(prepared.lowered.graph, prepared.lowered.feeds(prepared.calls[name]))[1]

    shapes = observed(seen("traced"), {axis.name: seen(f"{axis.name}={axis.other}") for axis in prepared.axes})
    model = stitch(prepared.lowered.graph, shapes, known)
    gm = prepared.lowered.graph
    tensors = (*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False))
    fuse(model, {name for name, _ in tensors})
    onnx_ir.save(model, path, external_data=f"{path.name}.data")
    onnx = need("onnx")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).splitlines()[0]
        raise PpclError(f"{path.name}: onnx.checker refuses it ({reason}); nothing was kept") from error
    return model


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
    names = {name for name, _ in gm.named_parameters(remove_duplicate=False)}
    return sum(value.const_value.size for name, value in model.graph.initializers.items() if name in names)


def floats_as(kwargs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return a call with its floating-point tensors in another type, as a pipeline of that type passes them."""
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in kwargs.items()
    }
