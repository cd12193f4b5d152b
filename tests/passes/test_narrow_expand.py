"""Narrowing linear layers to the rows that are read, and looking inside modules that were left whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ppcl_fx.ir.graphs import copy_graph_module, parameter_count
from ppcl_fx.passes.contract import Pipeline
from ppcl_fx.passes.lowering.dead_code import DeadCode
from ppcl_fx.passes.lowering.expand import Expand
from ppcl_fx.passes.lowering.narrow import Narrow
from ppcl_fx.tracing import bind, trace, trace_inside
from tests import models

WIDTH = 4


class Chunks(nn.Module):
    """A linear layer whose output is cut into four, of which some are summed up."""

    def __init__(self, used: tuple[int, ...], bias: bool = True, dim: int = -1) -> None:
        super().__init__()
        self.used = used
        self.dim = dim
        self.linear = nn.Linear(WIDTH, 4 * WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Sum the chunks that are used, each times its number."""
        parts = self.linear(x).chunk(4, dim=self.dim)
        total = parts[self.used[0]] * (self.used[0] + 1)
        for index in self.used[1:]:
            total = total + parts[index] * (index + 1)
        return total


class Twice(Chunks):
    """The same, but the whole output is read too."""

    def forward(self, x: Tensor) -> Tensor:
        """Add the mean of all rows."""
        return super().forward(x) + self.linear(x).mean()


class Wrapped(nn.Linear):
    """Not a plain matrix: what a wrapper of weights looks like."""


def graph(module: nn.Module) -> tuple[GraphModule, Tensor, Tensor]:
    """Trace a module; return its graph without dead code, an input and the result."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        x = torch.randn(4, WIDTH)
    gm = trace_inside(module, {"x": x})
    DeadCode()(gm)
    with torch.no_grad():
        return gm, x, module(x)


@pytest.mark.parametrize("used", [(0,), (0, 1), (1, 2), (0, 1, 2), (3,)])
@pytest.mark.parametrize("bias", [True, False])
def test_neighbouring_rows_become_a_view_of_the_weight(used: tuple[int, ...], bias: bool) -> None:
    module = Chunks(used, bias)
    gm, x, expected = graph(module)
    assert Pipeline([Narrow()], debug=True)(gm).modified
    linear = gm.get_submodule("linear")
    rows = slice(used[0] * WIDTH, (used[-1] + 1) * WIDTH)
    assert isinstance(linear, nn.Linear)
    assert torch.equal(linear.weight, module.linear.weight[rows])
    assert linear.weight.data_ptr() == module.linear.weight[rows].data_ptr()
    assert (linear.bias is None) == (not bias)
    assert torch.allclose(gm(x), expected, atol=1e-6)
    assert module.linear.out_features == 4 * WIDTH
    assert not Pipeline([Narrow()], debug=True)(gm).modified


def test_rows_apart_are_put_together() -> None:
    module = Chunks((0, 3))
    gm, x, expected = graph(module)
    assert Pipeline([Narrow()], debug=True)(gm).modified
    weight = gm.get_parameter("linear.weight")
    assert torch.equal(weight, torch.cat([module.linear.weight[:WIDTH], module.linear.weight[3 * WIDTH :]]))
    assert torch.allclose(gm(x), expected, atol=1e-6)


def wrapped(used: tuple[int, ...]) -> nn.Module:
    module = Chunks(used)
    module.linear = Wrapped(WIDTH, 4 * WIDTH)
    return module


@pytest.mark.parametrize(
    "module",
    [Chunks((0, 1, 2, 3)), Chunks((0, 1), dim=0), Twice((0, 1)), wrapped((0, 1))],
    ids=["all are read", "cut along the batch", "read by another", "not a plain linear"],
)
def test_what_must_not_shrink_does_not(module: nn.Module) -> None:
    gm, x, expected = graph(module)
    assert not Pipeline([Narrow()], debug=True)(gm).modified
    assert torch.equal(gm(x), expected)


@pytest.fixture(scope="module", params=["qwen", "flux", "sd3"])
def case(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any], GraphModule]:
    build = {"qwen": models.tiny_qwen, "flux": models.tiny_flux, "sd3": models.tiny_sd3}[request.param]
    model, kwargs = build()
    return model, kwargs, trace(model, kwargs)


def test_looking_inside_a_module_is_exact(case: tuple[Any, dict[str, Any], GraphModule]) -> None:
    model, kwargs, gm = case
    expanded = copy_graph_module(gm)
    chosen = ("transformer_blocks.1.attn", "transformer_blocks.0.norm1")
    result = Pipeline([Expand(modules=frozenset(chosen))], debug=True)(expanded)
    assert result.modified
    called = {str(node.target) for node in expanded.graph.nodes if node.op == "call_module"}
    assert not called & set(chosen)
    assert "transformer_blocks.1.attn.to_q" in called
    assert set(expanded.state_dict()) == set(gm.state_dict())
    assert parameter_count(expanded) == parameter_count(gm)
    for given in (kwargs, models.other_kwargs(model)):
        with torch.no_grad():
            assert torch.equal(expanded(**bind(expanded, given))[0], model(**given)[0])
    # Nodes from the inside belong to the block that they came from.
    node = next(n for n in expanded.graph.nodes if n.target == "transformer_blocks.1.attn.to_q")
    assert {"transformer_blocks.1", "transformer_blocks.1.attn"} <= set(node.meta["nn_module_stack"])
    # The model's own module is as it was.
    assert model.transformer_blocks[1].attn.to_q is not None
    assert gm.get_submodule("transformer_blocks.1.attn") is model.transformer_blocks[1].attn


def test_a_module_with_all_of_its_results_in_use_stays_whole(case: tuple[Any, dict[str, Any], GraphModule]) -> None:
    expanded = copy_graph_module(case[2])
    assert not Pipeline([Expand()], debug=True)(expanded).modified
