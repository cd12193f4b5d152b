"""Ask a model, without computing, whether it takes sizes far from those of its example."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ppcl_fx.export.extras import log_from
from ppcl_fx.export.onnx.dynamic_axes import REFUSALS, Axis, resized
from ppcl_fx.export.onnx.graph_run import run_graph
from ppcl_fx.export.onnx.writer import Prepared


def refused(prepared: Prepared, sizes: Mapping[str, int]) -> str | None:
    """Tell why a model does not take a call of certain sizes: a position table that ends, a check in its code.

    The graph runs on tensors without content, so the sizes may be those of the largest picture.

    Args:
        prepared: the graph as it was, and its example.
        sizes: for open sizes, by name, the value; others stay as in the example.

    Returns:
        A line that names the size and the model's reason; ``None`` if it takes them all, or if it cannot be told: the
        graph asks for the content of a tensor, or no Python argument is known that gives a size.
    """
    example = prepared.calls["traced"]
    if _fault(prepared, example) is not None:
        return None
    call = dict(example)
    for axis in prepared.axes:
        wanted = _at(axis, sizes.get(axis.name, axis.size))
        if wanted is None:
            continue
        call = resized(call, wanted)
        fault = _fault(prepared, call)
        if fault is not None:
            return f"{axis.name} = {wanted.other} is asked for, and the model does not take it ({fault})"
    return None


def _at(axis: Axis, size: int) -> Axis | None:
    """Return an axis whose other size is `size`, with the numbers that positions are given by; None if unknown."""
    if size == axis.size:
        return None
    numbers = []
    for old, new in axis.numbers:
        # A number that is there twice, as height and width, changes the size by its square.
        power = next((p for p in (1, 2, 3) if axis.size * new**p == axis.other * old**p), None)
        if power is None:
            return None
        found = round(old * (size / axis.size) ** (1 / power))
        if axis.size * found**power != size * old**power:
            return None
        numbers.append((old, found))
    return dataclasses.replace(axis, other=size, numbers=tuple(numbers))


def _fault(prepared: Prepared, call: dict[str, Any]) -> str | None:
    # A refusal is an answer here, and torch would log it with its traceback.
    unlogged = log_from("torch._subclasses.fake_tensor", logging.CRITICAL)
    try:
        with torch.no_grad(), unlogged, FakeTensorMode(allow_non_fake_inputs=True):
            run_graph(prepared.gm, call)
    except REFUSALS as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None
