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

from ppcl_fx.calls.examples import build_call, floats_as
from ppcl_fx.calls.kinds import Examples
from ppcl_fx.errors import PpclError, ValuesNeeded
from ppcl_fx.io.shards import loaded_dtype
from ppcl_fx.ir.dtypes import kept_in_float32, main_dtype, set_dtypes
from ppcl_fx.ir.graphs import attribute, finished
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.passes.edits.plug import edited, plugged
from ppcl_fx.schema.plan import Plan
from ppcl_fx.tracing import trace
from ppcl_fx.tracing.meta_model import skeleton

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
    return over(graph, _anew(graph, plan, model, example))


def _anew(graph: GraphModule, plan: Plan, model: nn.Module, call: Mapping[str, Any]) -> GraphModule:
    """Trace `model`, which has no weights, as `graph` was, with its edits, and as the mixture that it is, if it is one.

    Where the model looks at values it gets the weights of `graph` for the trace.
    """
    try:
        traced = trace(model, call)
    except ValuesNeeded:
        if not _take_weights(model, graph):
            raise
        traced = _weightless(trace(model, call))
    mixture: tuple[Plan, Sequence[str]] | None = graph_info(graph).get("mixture")
    if mixture is None:
        return insert_edits(traced, plan)
    return plugged(insert_edits(traced, mixture[0]), frozenset(mixture[1]))


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


def _class_of(config: Mapping[str, Any], way: str = ADVICE) -> Any:
    """Return the class of diffusers that a model was traced from."""
    import diffusers

    found = getattr(diffusers, str(config.get("_class_name")), None)
    if not isinstance(found, type) or not issubclass(found, diffusers.ModelMixin):
        raise PpclError(f"the model was traced from no class of diffusers, so it cannot be traced again; {way}")
    return found


def _on_meta(config: Mapping[str, Any]) -> nn.Module:
    kind = _class_of(config)
    try:
        with torch.device("meta"):
            made: nn.Module = kind.from_config(dict(config))
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        name = kind.__name__
        raise PpclError(f"{name} cannot be built without weights ({reason}), nor traced again; {ADVICE}") from error
    return made.eval()


def take_dtypes(model: nn.Module, like: nn.Module, dtypes: Dtypes = lambda dtype: dtype) -> None:
    """Give every parameter and buffer of `model` the dtype that its namesake in `like` has, or will have."""
    there = [*like.named_parameters(), *like.named_buffers()]
    set_dtypes(model, {name: dtypes(tensor.dtype) for name, tensor in there})


# ---- a model as it would be in another dtype, beside the one that is there ---------------------------------------


def is_loaded_as(graph: GraphModule, dtype: torch.dtype) -> bool:
    """Tell whether every weight of a traced graph has the dtype that loading its model in `dtype` gives it."""
    kept = kept_in_float32(graph)
    floating = [(name, p.dtype) for name, p in graph.named_parameters() if p.is_floating_point()]
    return all(own == loaded_dtype(name, dtype, kept) for name, own in floating)


def is_mixture(graph: GraphModule) -> bool:
    """Tell whether a graph is a mixture, and knows of which plan and with which edits."""
    return graph_info(graph).get("mixture") is not None


def loaded_as(
    graph: GraphModule, plan: Plan, dtype: torch.dtype, example: Mapping[str, Any] | None = None
) -> GraphModule:
    """Return the graph that would be there had the model been loaded in `dtype`; without weights, see `with_weights`.

    What its class keeps in float32 is in float32.

    Args:
        graph: a traced graph, a pluggable one, or a mixture of one; stays as it is.
        plan: the plan of a pluggable graph; a mixture knows its own.
        dtype: the dtype.
        example: the arguments of a call, by the names of the graph's inputs, for models that look at values; by
            default what is known of the traced one.

    Raises:
        PpclError: the model's class is not known, or the graph is not what is traced from it.
    """
    info, name = graph_info(graph), str(dtype).removeprefix("torch.")
    mixture: tuple[Plan, Sequence[str]] | None = info.get("mixture")
    if info.get("alone") and mixture is None:
        raise PpclError(
            f"{info['alone']} lacks blocks of its teacher, so it cannot be traced in {name}; load it in that type: "
            f"ppcl_fx.load(folder, dtype=torch.{name})"
        )
    config = info.get("config", {})
    way = f"convert the model to {name} before it is traced or rewritten, or leave --dtype out"
    model = skeleton(_class_of(config, way), config, dtype)
    if example is None:
        call = build_call(info["example"])
    else:
        ones = {name: sizes for name, (sizes, _) in info["ones"].items()}
        call = Examples({**info["fixed"], **example}, ones=ones)
    fresh = _anew(graph, plan, model, call.over(floats_as(call, dtype)))
    changed = _difference(graph, fresh)
    if changed is not None:
        raise PpclError(
            f"the graph is not what is traced from {config['_class_name']} ({changed}), so it cannot be made in "
            f"{name}; convert the model to that type, trace it again, and change that graph, or leave --dtype out"
        )
    for kept in ("model", "unused"):  # of the weights, which this has not
        graph_info(fresh)[kept] = info[kept]
    return fresh.train(graph.training)


def _take_weights(model: nn.Module, graph: GraphModule) -> bool:
    """Put the weights that a graph holds into a model, in the model's dtypes; tell whether it has all of them then."""
    held = {**graph_info(graph)["unused"], **graph.state_dict()}
    like = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    there = {name: held[name] for name in like if name in held and not held[name].is_meta}
    model.load_state_dict(
        {name: tensor.detach().to("cpu", like[name]) for name, tensor in there.items()}, strict=False, assign=True
    )
    return there.keys() == like.keys()


def _difference(graph: GraphModule, fresh: GraphModule) -> str | None:
    """Return what tells a graph from one that was traced anew, None where nothing does."""
    own, new = ({name: p.shape for name, p in one.named_parameters()} for one in (graph, fresh))
    odd = next((name for name in {**own, **new} if own.get(name) != new.get(name)), None)
    if odd is not None:
        return f"its parameter {odd} is another"
    done, again = (graph_info(one).get("passes", []) for one in (graph, fresh))
    return None if done == again else f"its passes are {', '.join(str(record['name']) for record in done)}"


def with_weights(fresh: GraphModule, graph: GraphModule) -> GraphModule:
    """Return a copy of what `loaded_as` made of `graph`, with the weights of `graph` in its dtypes, on the CPU."""
    made = copy.deepcopy(fresh)
    made.meta = dict(fresh.meta)
    held = {**dict(graph.named_parameters(remove_duplicate=False)), **graph.state_dict(keep_vars=True)}
    values: dict[tuple[int, torch.dtype], nn.Parameter] = {}
    for path, module in made.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                source = held[f"{path}.{name}".lstrip(".")]
                key = (id(source), parameter.dtype)
                if key not in values:  # a weight that has several names stays one
                    values[key] = nn.Parameter(source.detach().to("cpu", parameter.dtype), requires_grad=False)
                module._parameters[name] = values[key]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                source = buffer if is_constant(name) else held.get(f"{path}.{name}".lstrip("."), buffer)
                module._buffers[name] = source.detach().to("cpu", buffer.dtype)
    return made


def is_constant(name: str) -> bool:
    """Tell by its name whether a tensor of a graph is a constant that the trace met, and not one of the model's."""
    return "_constant_" in name.rpartition(".")[2]
