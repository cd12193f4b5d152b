"""From a diffusion transformer to a `torch.fx` graph whose nodes know their block."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ppcl_fx.calls.examples import describe
from ppcl_fx.calls.kinds import Examples, Sizes, filled, is_fixed, kind_of, ones_in, repeated
from ppcl_fx.errors import GuardError, PpclError, foreign, near
from ppcl_fx.io.build_bounds import Room
from ppcl_fx.io.fingerprint import fingerprint
from ppcl_fx.ir.dtypes import kept_in_float32
from ppcl_fx.ir.graphs import container
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.tracing.held import check_free, check_loadable
from ppcl_fx.tracing.leaves import block_lists, inlined_modules
from ppcl_fx.tracing.tracer import ExampleTracer

__all__ = ["Unused", "bind", "graph_for", "trace", "trace_inside", "trace_saved", "with_rows"]


class Unused(dict[str, Tensor]):
    """Weights of a model that a traced call does not need, by name: they are saved with it. Copies share them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Unused:
        return self


def trace(model: nn.Module, example_kwargs: Mapping[str, Any]) -> GraphModule:
    """Trace a diffusion transformer, in evaluation mode, on any device, the meta device included.

    Blocks are inlined; the modules inside them (attention, feed-forward, norms, linears) stay ``call_module`` nodes.
    The parameters are the model's own, shared. Tensors of the example are only looked at for shape and dtype, and
    where some calls of a recording lack a mask: the model is then run on one of them, once as it is and once with a
    mask of ones. If that is the same to the bit the trace serves both kinds of call.
    ``gm.meta["ppcl"]`` holds ``inputs`` (the placeholders), ``fixed`` (arguments that are part of the trace),
    ``ones`` (inputs that are ones where a call lacks them, with shape and dtype), ``kinds`` (graphs over the same
    modules for the recording's other kinds of call, see `graph_for`), ``blocks`` (the blocks' paths), ``example`` (the
    shapes of the traced call), ``config`` (the model's), ``kept`` (what its class keeps in float32), ``unused``
    (weights that such a call does not need) and ``model`` (its fingerprint).

    Args:
        model: the transformer.
        example_kwargs: the keyword arguments of one call, or what `ppcl_fx.Calls.examples` returns. Those that are
            neither ``None`` nor a boolean, a string or an empty dict become placeholders.

    Returns:
        A graph module that is called with the placeholders' names, and returns what the model returns with
        ``return_dict=False``.

    Raises:
        PpclError: something holds the model (hooks, a wrapper, quantisation), it could not be loaded again
            (`check_loadable`), it has no blocks, an argument is unknown, or a branch depends on a tensor's values.
    """
    check_free(model)
    check_loadable(model)
    signature = inspect.signature(model.forward)
    given, ones = _completed(model, example_kwargs)
    if "return_dict" in signature.parameters:
        given["return_dict"] = False
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
    for name in given:
        if name not in signature.parameters and not open_ended:
            raise PpclError(
                f"the transformer takes no argument {name!r}{near(name, signature.parameters)}; "
                f"it takes {', '.join(signature.parameters)}"
            )
    lists = block_lists(model)
    if not lists:
        raise PpclError(
            f"{type(model).__name__} has no transformer blocks (no ModuleList whose elements all contain attention); "
            "give a diffusion transformer"
        )
    blocks = [f"{path}.{name}" for path in lists for name in model.get_submodule(path)._modules]
    symbolic = {name: value for name, value in given.items() if not is_fixed(value)}
    fixed = {name: copy.copy(value) for name, value in given.items() if is_fixed(value)}
    with foreign(f"{type(model).__name__} does not take this call", "give one that was recorded with this model"):
        gm = _graph_module(model, inlined_modules(model), set(blocks), symbolic, fixed)
    used = gm.state_dict()
    gm.meta["ppcl"] = {
        "inputs": list(symbolic),
        "fixed": {name: value for name, value in fixed.items() if value is not None},
        "ones": ones,
        "blocks": blocks,
        "signature": list(signature.parameters),
        "example": {
            name: describe(value, ones[name][0] if name in ones else None)
            for name, value in given.items()
            if value is not None
        },
        "config": _config(model),
        "kept": list(kept_in_float32(model)),
        "unused": Unused({name: t for name, t in model.state_dict().items() if name not in used}),
        "model": fingerprint(model),
        "kinds": {},
    }
    for other in example_kwargs.others if isinstance(example_kwargs, Examples) else ():
        try:
            bind(gm, other)
        except GuardError:  # it has not the inputs of such a call
            graph_info(gm)["kinds"][kind_of(other)] = trace(model, other)
    return gm


def with_rows(gm: GraphModule, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call whose tensors have a row for each sample where the traced call's have: one text is repeated.

    That is the same but for rounding: it is for files whose sizes are tied, and for training that promises no more.
    """
    return repeated(kwargs, {str(node.target): node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")})


def graph_for(gm: GraphModule, kwargs: Mapping[str, Any]) -> GraphModule:
    """Return the graph that takes calls of a kind: a trace, or a pluggable graph, may have several."""
    kinds = graph_info(gm).get("kinds")
    found = kinds.get(kind_of(kwargs), gm) if kinds else gm
    assert isinstance(found, GraphModule)
    return found


def _completed(
    model: nn.Module, example_kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, tuple[Sizes, torch.dtype]]]:
    """Return the call to trace with, which has every argument that stands for ones in others, and those arguments."""
    examples = example_kwargs if isinstance(example_kwargs, Examples) else Examples(example_kwargs)
    weightless = any(parameter.is_meta for parameter in model.parameters())
    known = examples.ones or (ones_in(examples, model) if examples.others and not weightless else {})
    given = {name: value for call in (*examples.others, examples) for name, value in call.items() if value is not None}
    ones = {name: (sizes, given[name].dtype) for name, sizes in known.items() if name in given}
    return filled(examples, ones), ones


def trace_saved(model: nn.Module, example_kwargs: Mapping[str, Any], where: Path) -> GraphModule:
    """Trace a model by a call that the file `where` describes; what it has against it is told in one line."""
    room = Room.of({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    try:
        with room.kept(str(where)):
            return trace(model, example_kwargs)
    except PpclError as error:
        line = str(error).removeprefix(f"{where}: ")
        raise PpclError(f"{where}: the call in it is damaged, or of another model: {line}") from error


def trace_inside(module: nn.Module, args: Mapping[str, Any]) -> GraphModule:
    """Trace one module (an attention, an adaptive norm) by its arguments, down to `torch.nn` modules: what a leaf of
    `trace` looks like inside. ``None``, booleans and strings are part of the trace.
    """
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    inlined = {
        path
        for path, child in module.named_modules()
        if path == "" or isinstance(child, containers) or not type(child).__module__.startswith("torch.nn")
    }
    symbolic = {name: value for name, value in args.items() if not is_fixed(value)}
    fixed = {name: value for name, value in args.items() if is_fixed(value)}
    return _graph_module(module, inlined, set(), symbolic, fixed)


def _config(model: nn.Module) -> dict[str, Any]:
    """Return a diffusers configuration as plain JSON values, or nothing for other models."""
    config = getattr(model, "config", None)
    if not isinstance(config, Mapping):
        return {}
    plain = {name: value for name, value in config.items() if not name.startswith("_")}
    return {"_class_name": type(model).__name__, **json.loads(json.dumps(plain, default=str))}


def _graph_module(
    model: nn.Module, inlined: set[str], blocks: set[str], symbolic: Mapping[str, Any], fixed: Mapping[str, Any]
) -> GraphModule:
    tracer = ExampleTracer(model, inlined, blocks)
    graph = tracer.trace(symbolic, fixed)
    for node in graph.nodes:
        node.meta.pop("kept", None)
        node.meta.pop("actual", None)
    root = container(model)
    for name, tensor in tracer.constants.items():
        root.register_buffer(name, tensor, persistent=False)
    gm = GraphModule(root, graph, class_name=type(model).__name__)
    gm.train(model.training)
    return gm


def bind(gm: GraphModule, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a call's keyword arguments into those of a traced graph; GuardError where they lie outside of the trace.

    Drops what is ``None`` and what equals the trace's fixed arguments. Puts ones in the place of a missing mask, where
    that is the same (``ones`` of the trace).
    """
    info = graph_info(gm)
    bound: dict[str, Any] = {}
    for name, value in filled(kwargs, info.get("ones", {})).items():
        if name in info["inputs"] and not is_fixed(value):
            bound[name] = value
        elif name == "return_dict" or value is None or (name in info["fixed"] and info["fixed"][name] == value):
            continue
        else:
            raise GuardError(
                f"this call lies outside of what was traced: the argument {name!r} was "
                f"{info['fixed'].get(name, 'not given')!r} while tracing; trace the model again with it"
            )
    missing = [name for name in info["inputs"] if name not in bound]
    if missing:
        raise GuardError(
            f"this call lies outside of what was traced: the argument {missing[0]!r} was given while tracing and is "
            "missing now; give it, or trace the model again without it"
        )
    return bound
