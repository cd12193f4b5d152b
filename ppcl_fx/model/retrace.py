"""Pluggable graphs from traces: edits inserted, and traced again for another dtype or another kind of call.

A trace knows dtypes: branches were decided by them, guards check them, and what `passes.lowering.expand` opens is
traced with them. So a model that moves to another dtype needs another graph. It is made anew on the meta device, where
it costs no memory, gets the same edits, and is put over the modules that are there: weights, hooks and processors stay
the very same objects.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from ppcl_fx.calls.examples import build_call
from ppcl_fx.errors import PpclError
from ppcl_fx.ir.dtypes import main_dtype, set_dtypes
from ppcl_fx.ir.graphs import attribute, finished
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.passes.edits.plug import edited, plugged
from ppcl_fx.schema.plan import Plan
from ppcl_fx.tracing import trace

Dtypes = Callable[[torch.dtype], torch.dtype]
ADVICE = "load or rewrite it anew with calls like this one"


def insert_edits(gm: GraphModule, plan: Plan) -> GraphModule:
    """Return a pluggable graph: `gm` with a switch for every edit of the plan. `gm` itself stays as it is.

    Idempotent: edits that the graph has already are left alone.

    Raises:
        PpclError: the plan contradicts itself.
        Refusal: an edit does not fit the model; the message says why.
    """
    made = finished(edited(gm, plan))
    kinds = graph_info(gm).get("kinds") or {}
    # The edits are made without weights, and then put over the students that are there.
    graph_info(made)["kinds"] = {
        kind: over(made, finished(edited(_weightless(other), plan))) for kind, other in kinds.items()
    }
    return made


def _weightless(gm: GraphModule) -> GraphModule:
    """Return a copy whose parameters are on the meta device."""
    empty = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in gm.parameters()}
    return copy.deepcopy(gm, dict(empty))


def dtypes_of(fn: Callable[[torch.Tensor], torch.Tensor]) -> Dtypes:
    """Return what a conversion, as `torch.nn.Module.to` gives it to ``_apply``, does to a dtype."""
    return functools.cache(lambda dtype: dtype if dtype.is_complex else fn(torch.empty(0, dtype=dtype)).dtype)


def sparing_complex(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a conversion that moves complex tensors (rotary tables) and leaves their dtype alone."""

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_complex():
            return fn(tensor)
        return tensor.to(fn(torch.empty(0, device=tensor.device)).device)

    return convert


def retraced(
    graph: GraphModule, plan: Plan, dtypes: Dtypes = lambda dtype: dtype, example: Mapping[str, Any] | None = None
) -> GraphModule:
    """Return a pluggable graph, traced again, over the modules and parameters of `graph`, which stays as it is.

    Args:
        graph: the pluggable graph.
        plan: its plan.
        dtypes: which dtype each of now becomes; the caller converts the parameters themselves.
        example: the arguments of one call; by default those of the trace, in their new dtypes.

    Raises:
        PpclError: the model's class is not known, or cannot be built on the meta device.
    """
    info = graph_info(graph)
    mixture: tuple[Plan, Sequence[str]] | None = info.get("mixture")
    if info.get("alone") and (mixture is None or example is None):
        raise PpclError(
            f"{info['alone']} lacks blocks of its teacher, so it cannot be traced again; load it in the dtype that it "
            "is to compute in: ppcl_fx.load(folder, dtype=torch.bfloat16)"
        )
    model = _on_meta(info.get("config", {}))
    take_dtypes(model, graph, dtypes)
    if example is None:
        # What a pipeline passes in another dtype than the model's, a timestep in float32, stays as it is.
        main = main_dtype(graph)
        example = build_call(info["example"], {main: dtypes(main)})
    fresh = insert_edits(trace(model, example), plan if mixture is None else mixture[0])
    return over(graph, fresh if mixture is None else plugged(fresh, frozenset(mixture[1])))


def over(graph: GraphModule, fresh: GraphModule) -> GraphModule:
    """Return the graph of `fresh` over the modules and parameters of `graph`. Raises PpclError where one is missing."""
    for node in fresh.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            try:
                attribute(graph, node.target)
            except AttributeError as error:
                lost = f"it has no {node.target!r}, which this call needs"
                raise PpclError(f"the model cannot be traced again: {lost}; {ADVICE}") from error
    made = GraphModule(graph, fresh.graph, class_name=graph.__class__.__name__)
    # Both are of the weights, which a model on the meta device does not have.
    kept = {name: graph_info(graph)[name] for name in ("model", "unused")}
    made.meta = {**fresh.meta, "ppcl": {**graph_info(fresh), **kept}}
    made.train(graph.training)
    return made


def _on_meta(config: Mapping[str, Any]) -> nn.Module:
    import diffusers

    name = str(config.get("_class_name"))
    found = getattr(diffusers, name, None)
    if not isinstance(found, type) or not issubclass(found, diffusers.ModelMixin):
        raise PpclError(f"the model was traced from no class of diffusers, so it cannot be traced again; {ADVICE}")
    kind: Any = found
    try:
        with torch.device("meta"):
            made: nn.Module = kind.from_config(dict(config))
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PpclError(f"{name} cannot be built without weights ({reason}), nor traced again; {ADVICE}") from error
    return made.eval()


def take_dtypes(model: nn.Module, like: nn.Module, dtypes: Dtypes = lambda dtype: dtype) -> None:
    """Give every parameter and buffer of `model` the dtype that its namesake in `like` has, or will have."""
    there = [*like.named_parameters(), *like.named_buffers()]
    set_dtypes(model, {name: dtypes(tensor.dtype) for name, tensor in there})
