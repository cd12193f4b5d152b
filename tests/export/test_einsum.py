"""Einstein sums that only move dimensions become permutations; others stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ppcl_fx.export import lower
from ppcl_fx.export.onnx.graph_run import run_graph
from ppcl_fx.passes.lowering.einsum import EinsumToPermute
from ppcl_fx.tracing import bind, trace
from tests import models


def sums(gm: torch.fx.GraphModule) -> list[str]:
    return [node.args[0] for node in gm.graph.nodes if node.target is torch.einsum]


@pytest.mark.parametrize(("name", "count"), [("qwen", 0), ("flux", 0), ("sd3", 1)])
def test_models_compute_the_same_without_them(name: str, count: int) -> None:
    model, kwargs = getattr(models, f"tiny_{name}")()
    gm = trace(model, kwargs)
    assert len(sums(gm)) == count
    lowered, call = lower(gm), bind(gm, kwargs)
    assert sums(lowered.graph) == [] and len(sums(gm)) == count
    result = run_graph(lowered.graph, lowered.feeds(call))[0]
    with torch.no_grad():
        assert torch.equal(result, model(**call, return_dict=False)[0])


class _Sums(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        turned = torch.einsum("a b c -> cab", x)
        listed = torch.einsum("abc->acb", [turned])
        return (
            turned, listed, torch.einsum("abc->ab", x), torch.einsum("abc", x), torch.einsum("...c->c...", x),
            torch.einsum("abc,abc->cab", x, x), torch.einsum("aab->ab", x),
        )  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 3, 5), (2, 2, 7)])
def test_what_sums_or_repeats_or_has_more_operands_stays(shape: tuple[int, ...]) -> None:
    gm, x = torch.fx.symbolic_trace(_Sums()), torch.rand(shape)
    expected = gm(x)
    assert EinsumToPermute()(gm).modified and not EinsumToPermute()(gm).modified
    assert sums(gm) == ["abc->ab", "abc", "...c->c...", "abc,abc->cab", "aab->ab"]
    orders = [node.args[1] for node in gm.graph.nodes if node.target is torch.permute]
    assert orders == [(2, 0, 1), (0, 2, 1)]
    assert all(torch.equal(one, two) for one, two in zip(gm(x), expected, strict=True))
