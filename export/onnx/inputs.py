"""The call that a graph is exported with, and the graph in the type that is wanted."""

from __future__ import annotations

import copy
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

from ppcl_fx.errors import PpclError, foreign
from ppcl_fx.export.onnx.graph_run import refresh_examples
from ppcl_fx.export.onnx.writer import floats_as
from ppcl_fx.export.store.weight_source import weightless
from ppcl_fx.ir.dtypes import main_dtype
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.tracing import bind

if TYPE_CHECKING:
    from ppcl_fx.calls.store import Calls


def in_type(
    gm: GraphModule, calls: Calls | None, dtype: torch.dtype | None
) -> tuple[GraphModule, dict[str, Any], int]:
    """Return a graph with weights of a type, and a call for it in that type.

    Args:
        gm: the graph; stays as it is.
        calls: where the call comes from, see `example`.
        dtype: the type of weights and floating-point inputs, as in a pipeline of that type; None for the graph's own.
            Timesteps and other numbers stay as wide as they are.

    Returns:
        The graph, itself where it is of that type already, else a copy; the arguments of the call; its samples. They
        are on the CPU; on the meta device where the graph's parameters are there.
    """
    kwargs, batch = example(gm, calls)
    kwargs = floats_as(kwargs, dtype or main_dtype(gm))
    place = "meta" if weightless(gm) else "cpu"
    kwargs = {name: v.to(place) if isinstance(v, torch.Tensor) else v for name, v in kwargs.items()}
    here = all(p.device.type == place for p in gm.parameters())
    fits = dtype is None or all(p.dtype == dtype for p in gm.parameters() if p.is_floating_point())
    if here and fits:
        return gm, kwargs, batch
    converted = copy.deepcopy(gm)
    # Buffers are real even where parameters are not, and stay so.
    converted = converted.to(dtype=dtype) if place == "meta" else converted.to(device="cpu", dtype=dtype)
    converted.meta = dict(gm.meta)
    # A trace has the dtypes that the model was traced with written into its casts.
    new, old = (str(one).removeprefix("torch.") for one in (main_dtype(converted), main_dtype(gm)))
    with foreign(
        f"the graph, traced in {old}, cannot be computed in {new}",
        f"save the model in that type (ppcl_fx.load(STUDENT, dtype=torch.{new}).save(OTHER)) and export OTHER, or "
        "leave --dtype out",
    ):
        refresh_examples(converted, kwargs)
    return converted, kwargs, batch


def example(gm: GraphModule, calls: Calls | None) -> tuple[dict[str, Any], int]:
    """Return the arguments of one call of a graph and the samples in it.

    Args:
        gm: the graph.
        calls: recorded calls; without them tensors are random, in the shapes of the trace.

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
    kwargs: dict[str, Any] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            kwargs[str(node.target)] = _random(value, generator) if isinstance(value, torch.Tensor) else value
    first = [v.shape[0] for v in kwargs.values() if isinstance(v, torch.Tensor) and v.ndim]
    return kwargs, Counter(first).most_common(1)[0][0]


def _random(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if like.is_floating_point():
        return torch.rand(like.shape, generator=generator).to(like.dtype)
    return torch.ones(like.shape, dtype=like.dtype)
