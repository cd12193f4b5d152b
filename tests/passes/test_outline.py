"""Outlined and inlined views of one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ppcl_fx.errors import Refusal
from ppcl_fx.ir.graphs import copy_graph_module, parameter_count
from ppcl_fx.ir.stacks import stacks
from ppcl_fx.passes.contract import Pipeline
from ppcl_fx.passes.edits.outline import Inline, Outline, outline
from ppcl_fx.tracing import bind, trace
from tests import models

BUILD = {"qwen": models.tiny_qwen, "flux": models.tiny_flux, "sd3": models.tiny_sd3}


@pytest.fixture(params=list(BUILD), scope="module")
def case(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any], GraphModule]:
    model, kwargs = BUILD[request.param]()
    return model, kwargs, trace(model, kwargs)


def same(gm: GraphModule, model: nn.Module) -> bool:
    for given in (models.other_kwargs(model),):
        with torch.no_grad():
            if not torch.equal(gm(**bind(gm, given))[0], model(**given)[0]):
                return False
    return True


def test_there_and_back_again(case: tuple[Any, dict[str, Any], GraphModule]) -> None:
    model, _, original = case
    # A graph module of its own: its submodules are replaced, the model's are not.
    gm = copy_graph_module(original)
    text = [node.format_node() for node in gm.graph.nodes]
    names, found = set(gm.state_dict()), [(s.name, s.streams, len(s.blocks)) for s in stacks(gm)]

    assert Pipeline([Outline()], debug=True)(gm).modified
    blocks = original.meta["ppcl"]["blocks"]
    calls = [n.target for n in gm.graph.nodes if n.op == "call_module" and n.target in blocks]
    assert calls == blocks
    assert all(isinstance(gm.get_submodule(path), GraphModule) for path in blocks)
    assert len(gm.graph.nodes) < len(text) / 2
    assert set(gm.state_dict()) == names
    assert parameter_count(gm) == parameter_count(original)
    assert same(gm, model)
    assert not Pipeline([Outline()], debug=True)(gm).modified

    assert Pipeline([Inline()], debug=True)(gm).modified
    assert len(gm.graph.nodes) == len(text)
    assert [(n.op, str(n.target)) for n in gm.graph.nodes] == [(n.op, str(n.target)) for n in original.graph.nodes]
    assert set(gm.state_dict()) == names
    assert [(s.name, s.streams, len(s.blocks)) for s in stacks(gm)] == found
    assert same(gm, model)
    assert not Pipeline([Inline()], debug=True)(gm).modified
    assert [node.format_node() for node in original.graph.nodes] == text


def test_an_outlined_block_runs_alone(case: tuple[Any, dict[str, Any], GraphModule]) -> None:
    _, kwargs, original = case
    gm = copy_graph_module(original)
    Outline()(gm)
    path = original.meta["ppcl"]["blocks"][1]
    seen: list[tuple[Any, Any]] = []
    block = gm.get_submodule(path)
    handle = block.register_forward_hook(lambda module, args, result: seen.append((args, result)))
    with torch.no_grad():
        gm(**bind(gm, kwargs))
        handle.remove()
        ((args, result),) = seen
        again = block(*args)
    for one, two in zip(again, result, strict=True):
        assert torch.equal(one, two)


class Chain(nn.Module):
    """Two layers with an operation between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(2, 2))
        self.two = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """One layer, a sum, the other layer."""
        return self.two(self.one(x) + 1)


def test_what_cannot_be_outlined_is_refused() -> None:
    gm = torch.fx.symbolic_trace(Chain())
    nodes = {str(node.target): node for node in gm.graph.nodes}
    with pytest.raises(Refusal, match=r"one cannot be outlined: two calls two, which lies outside of it"):
        outline(gm, "one", [nodes["one.0"], nodes["two"]])
    call = outline(gm, "one", [nodes["one.0"]])
    gm.recompile()
    assert call.target == "one"
    x = torch.ones(3, 2)
    assert gm(x).shape == (3, 2)
