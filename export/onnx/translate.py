"""Translate one segment of a graph into an ONNX graph whose weights are inputs."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.export import Dim
from torch.func import functional_call

from ppcl_fx.errors import PpclError
from ppcl_fx.export.onnx.repeated import open_repeats
from ppcl_fx.export.onnx.segments import GraphSegment

OPSET = 23


class _WithWeightsAsInputs(nn.Module):
    def __init__(self, segment: GraphSegment) -> None:
        super().__init__()
        self._hidden = (segment.graph,)  # in a tuple, so that its parameters are not this module's
        self._names = segment.parameters
        self._count = len(segment.inputs)

    def forward(self, *tensors: torch.Tensor) -> Any:
        """Run the segment on its inputs followed by its weights."""
        weights = dict(zip(self._names, tensors[self._count :], strict=True))
        with open_repeats():
            return functional_call(self._hidden[0], weights, tensors[: self._count])


def translate(segment: GraphSegment, inputs: list[torch.Tensor], changing: list[tuple[int, ...]]) -> ir.Graph:
    """Translate a segment with PyTorch's exporter.

    Args:
        segment: the segment.
        inputs: an example for each of its inputs; values do not matter.
        changing: for each input, its dimensions whose size must stay open.

    Returns:
        A graph whose inputs are the segment's inputs, then its parameters, in the segment's order.

    Raises:
        PpclError: PyTorch cannot export the segment, or only for one size of what must stay open.
    """
    weights = [_like(tensor) for tensor in _tensors(segment)]
    dims: list[Any] = [dict.fromkeys(dims, Dim.DYNAMIC) or None for dims in changing]
    module = _WithWeightsAsInputs(segment).eval()
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(
                module, (*inputs, *weights), dynamic_shapes=((*dims, *[None] * len(weights)),), strict=False
            )
            exported = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False, optimize=True)
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


def _tensors(segment: GraphSegment) -> list[torch.Tensor]:
    state = {
        **dict(segment.graph.named_parameters(remove_duplicate=False)),
        **dict(segment.graph.named_buffers(remove_duplicate=False)),
    }
    return [state[name] for name in segment.parameters]


def _like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)  # real for the exporter, and never touched


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes (about torchvision, about its own deprecations) from the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
