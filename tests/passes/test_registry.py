"""Every registered pass does what it declares, on traced and on exported graphs of three models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from ppcl_fx.calls.store import Call
from ppcl_fx.errors import GuardError, PpclError
from ppcl_fx.ir.graphs import copy_graph_module
from ppcl_fx.ir.stacks import Stack, stacks
from ppcl_fx.passes.calibration.calibration import Calibration, calibrate
from ppcl_fx.passes.context import Context
from ppcl_fx.passes.contract import Pass, Pipeline, _state
from ppcl_fx.passes.edits.depth import Depth
from ppcl_fx.passes.edits.ffn import Ffn
from ppcl_fx.passes.edits.outline import Outline
from ppcl_fx.passes.edits.plug import Plug
from ppcl_fx.passes.edits.text_stream import TextStream
from ppcl_fx.passes.lowering.dead_code import DeadCode
from ppcl_fx.passes.lowering.expand import Expand
from ppcl_fx.passes.lowering.lowering import LOWERING
from ppcl_fx.passes.lowering.positions import tables
from ppcl_fx.passes.lowering.tuples_apart import TuplesApart
from ppcl_fx.passes.registry import parse, registered
from ppcl_fx.tracing import bind, trace
from tests import models

pytestmark = pytest.mark.slow

Kwargs = dict[str, Any]
STACK = "transformer_blocks"
BUILD = {"qwen": models.tiny_qwen, "flux": models.tiny_flux, "sd3": models.tiny_sd3}
LAST = {"qwen": 5, "flux": 3, "sd3": 4}
FORMS = ["traced", "exported"]

REQUIRED = {"stack": STACK, "first": 1, "last": 2, "block": 3, "source": 1}
"""Values of the options that have no default, by their names; `calibration` is that of the model."""

MORE = ["plug{students=depth:transformer_blocks.0-1+ffn:transformer_blocks.2}", "dead-code{sinks=false}"]
MORE += ["expand{which=complex}", "depth{stack=transformer_blocks,first=0,last=2,init=middle}"]

IDLE = {
    ("qwen", "traced"): {"einsum-to-permute"},
    ("flux", "traced"): {"complex-to-real", "einsum-to-permute", "positions-as-inputs"},
    ("sd3", "traced"): {"complex-to-real", "positions-as-inputs"},
    ("qwen", "exported"): {
        "clamp-half", "complex-to-real", "einsum-to-permute", "expand", "positions-as-inputs", "text-stream",
        "tuples-apart"
    },
    ("flux", "exported"): {
        "clamp-half", "complex-to-real", "einsum-to-permute", "expand", "positions-as-inputs", "text-stream",
        "tuples-apart"
    },
    ("sd3", "exported"): {
        "clamp-half", "complex-to-real", "expand", "positions-as-inputs", "text-stream", "tuples-apart"
    },
}
"""Rewriting passes that have nothing to do on any graph of a model."""


@functools.cache
def base(name: str, form: str) -> tuple[GraphModule, Kwargs]:
    """A model as a graph, and a call of it."""
    model, kwargs = BUILD[name]()
    if form == "traced":
        return trace(model, kwargs), kwargs
    given = {key: value for key, value in kwargs.items() if value is not None}
    exported: Any = torch.export.export(model, (), given, strict=False).module(check_guards=False)
    return exported, given


@functools.cache
def calibration(name: str) -> Calibration:
    gm, kwargs = base(name, "traced")
    calls = [kwargs | {"hidden_states": by * kwargs["hidden_states"]} for by in (1.0, 0.5, 0.25, 2.0)]
    return calibrate(gm, [Call(call, ("a", "b"), 0.5, index, 2) for index, call in enumerate(calls)])


@functools.cache
def graphs(name: str, form: str) -> dict[str, GraphModule]:
    """The graph in the states in which one pass or another has something to do."""
    whole, kwargs = base(name, form)
    edits = [Depth(STACK, 0, 1), Ffn(STACK, 2)]
    edits += [TextStream(STACK, LAST[name] - 1, LAST[name])] if form == "traced" else []  # type: ignore[list-item]
    found = {"whole": whole, "edited": made(edits, whole)}
    found["plugged"] = made([Plug(frozenset(edit.edit.id for edit in edits))], found["edited"])
    found["cleaned"] = made([DeadCode()], found["plugged"])
    found["opened"] = made([Expand(), DeadCode()], found["cleaned"])
    found["outlined"] = made([Outline()], whole)
    if form == "traced":
        found["apart"] = made([TuplesApart()], whole)
        found["lowered"] = made([*LOWERING.passes][:7], whole)
        found["half"] = trace(BUILD[name]()[0].half(), in_half(kwargs))
    return found


def in_half(kwargs: Kwargs) -> Kwargs:
    def halved(value: Any) -> Any:
        return value.half() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return {key: halved(value) for key, value in kwargs.items()}


def made(passes: list[Any], gm: GraphModule) -> GraphModule:
    edited = copy_graph_module(gm)
    Pipeline(passes, debug=True)(edited)
    return edited


def passes(name: str) -> list[Pass]:
    """Every registered pass, some more than once; what reads an annotation comes after what writes it."""
    found = []
    for kind in registered().values():
        if kind.__module__.startswith("ppcl_fx.") and kind is not Pipeline:
            known = REQUIRED | {"calibration": calibration(name)}
            needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
            assert set(needed) <= set(known), f"{kind.name}: give its option a value in REQUIRED"
            found.append(kind(**{option: known[option] for option in needed}))
    found += [member for text in MORE for member in parse(text).passes]
    return sorted(found, key=lambda pass_: pass_.name == "candidate-intervals")


def outputs(gm: GraphModule, kwargs: Kwargs) -> list[torch.Tensor]:
    """What a graph computes, whichever way it takes its arguments."""
    if "inputs" in gm.meta.get("ppcl", {}):
        known = {**bind(gm, kwargs), **tables(gm, kwargs)}
        kwargs = {str(n.target): known[str(n.target)] for n in gm.graph.nodes if n.op == "placeholder"}
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(gm(**kwargs)) if isinstance(leaf, torch.Tensor)]


def check(pass_: Pass, gm: GraphModule, calls: list[Kwargs], expected: list[list[torch.Tensor]]) -> bool:
    """Hold a pass to the contract on one graph and what it gives for some calls; return whether it modified it."""
    before = _state(gm)
    try:
        result = Pipeline([pass_], debug=True)(gm)
    except PpclError:
        after = _state(gm)
        assert all(before[part] == after[part] for part in ("graph", "modules", "weights")), f"{pass_} left a mess"
        return False
    assert result.graph_module is gm
    if not result.modified:  # debug mode has made sure that nothing was, so the outputs are what they were
        return False
    assert pass_.kind == "rewrite"
    for number, (call, old) in enumerate(zip(calls, expected, strict=True)):
        try:
            new = outputs(gm, call)
        except GuardError:
            assert number > 0, f"{pass_} does not take the call that was traced"
            continue
        for one, two in zip(old, new, strict=True):
            assert one.shape == two.shape
            assert pass_.numerics != "exact" or torch.equal(one, two), f"{pass_} is not exact"
    assert blocks(lambda: Context.of(gm).stacks) == blocks(lambda: stacks(gm)), f"{pass_} keeps stacks that are not so"
    return True


def blocks(find: Callable[[], list[Stack]]) -> list[Any] | None:
    """Names, paths and outputs of the stacks that are found; None where there are none, as in an outlined graph."""
    try:
        return [(stack.name, [(block.path, block.outputs) for block in stack.blocks]) for stack in find()]
    except PpclError:
        return None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", sorted(BUILD))
def test_every_pass_does_what_it_declares(name: str, form: str) -> None:
    did: set[str] = set()
    kwargs = base(name, form)[1]
    whole = [kwargs, models.other_kwargs(BUILD[name]()[0])] if form == "traced" else [kwargs]
    for state, gm in graphs(name, form).items():
        calls = [in_half(call) for call in whole] if state == "half" else whole
        expected = [outputs(gm, call) for call in calls]
        for pass_ in passes(name):
            # Analyses are of the graph that was calibrated; it is as it was afterwards.
            graph = gm if pass_.kind == "analysis" else copy_graph_module(gm)
            if check(pass_, graph, calls, expected):
                did.add(pass_.name)
    rewrites = {pass_.name for pass_ in passes(name) if pass_.kind == "rewrite"}
    assert rewrites - did == IDLE[name, form]
