"""Translate one segment of a graph into an ONNX graph whose weights are inputs."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.export import Dim
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from ppcl_fx.errors import PpclError
from ppcl_fx.export.extras import log_from
from ppcl_fx.export.onnx.attention import AttentionForm, in_primitives
from ppcl_fx.export.onnx.segments import GraphSegment
from ppcl_fx.export.store.weight_source import state

OPSET = 23


class _Repeated(Sequence[Any]):
    """A list repeated an open number of times. To read an item is to fix the number, as without it.

    Python asks for the number when it repeats a list, and an export then holds for that number alone. Here the list is
    remembered with the open number, and a tensor made of it is one of open size.
    """

    def __init__(self, items: list[Any], times: torch.SymInt) -> None:
        self.items = items
        self.times = times

    def __len__(self) -> int:
        return len(self.items) * int(self.times)

    def __getitem__(self, index: Any) -> Any:
        return (self.items * int(self.times))[index]


class _TensorsOfRepeated(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and args and isinstance(args[0], _Repeated):
            once = func(args[0].items, *args[1:], **given)
            return once.repeat(args[0].times, *[1] * (once.ndim - 1))
        return func(*args, **given)


@contextlib.contextmanager
def _open_repeats() -> Iterator[None]:
    """Within it, a list times a symbolic number is a `_Repeated`, and ``torch.tensor`` of that has the open size."""
    original = torch.SymInt.__rmul__

    def times(self: torch.SymInt, other: Any) -> Any:
        return _Repeated(other, self) if type(other) is list and other else original(self, other)

    torch.SymInt.__rmul__ = times  # type: ignore[method-assign]
    try:
        with _TensorsOfRepeated():
            yield
    finally:
        torch.SymInt.__rmul__ = original  # type: ignore[method-assign]


class _WithWeightsAsInputs(nn.Module):
    def __init__(self, segment: GraphSegment) -> None:
        super().__init__()
        self._hidden = (segment,)  # in a tuple, so that its parameters are not this module's

    def forward(self, *tensors: torch.Tensor) -> Any:
        """Run the segment on its inputs followed by its weights."""
        (segment,) = self._hidden
        split = len(segment.inputs)
        weights = dict(zip(segment.parameters, tensors[split:], strict=True))
        with _open_repeats():
            return functional_call(segment.graph, weights, tensors[:split])


def translate(
    segment: GraphSegment,
    inputs: list[torch.Tensor],
    changing: list[tuple[int, ...]],
    attention: AttentionForm = "auto",
) -> ir.Graph:
    """Translate a segment with PyTorch's exporter.

    Args:
        segment: the segment.
        inputs: an example for each of its inputs; values do not matter.
        changing: for each input, its dimensions whose size must stay open.
        attention: how attention is written.

    Returns:
        A graph whose inputs are the segment's inputs, then its parameters, in the segment's order.

    Raises:
        PpclError: PyTorch cannot export the segment, or only for one size of what must stay open.
    """
    own = state(segment.graph)
    # Real for the exporter, and never touched.
    weights = [torch.empty(own[name].shape, dtype=own[name].dtype) for name in segment.parameters]
    dims: list[Any] = [dict.fromkeys(dims, Dim.DYNAMIC) or None for dims in changing]
    module = _WithWeightsAsInputs(segment).eval()
    own_ways: dict[Any, Any] = {torch.ops.aten.scaled_dot_product_attention.default: in_primitives}
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(
                module, (*inputs, *weights), dynamic_shapes=((*dims, *[None] * len(weights)),), strict=False
            )
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                optimize=True,
                custom_translation_table=own_ways if attention == "primitive" else None,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise PpclError(
            f"PyTorch cannot export {segment.name} to ONNX: {_first_line(error)}; run with -v for more, "
            "or export a model without that part"
        ) from error
    assert exported is not None
    model: ir.Model = exported.model
    if model.functions:
        ir.passes.common.InlinePass()(model)
    if len(model.graph.inputs) != len(inputs) + len(weights):
        raise RuntimeError(f"{segment.name}: the exporter changed the number of inputs")
    return model.graph


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes (about torchvision, about its own deprecations) from the user."""
    unprinted = contextlib.redirect_stdout(io.StringIO())
    with warnings.catch_warnings(), unprinted, log_from("torch.onnx", logging.ERROR):
        warnings.simplefilter("ignore")
        yield


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
