"""The contract of a pass, and the runner that holds passes to it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_manager import PassManager

from ppcl_fx.errors import PpclError
from ppcl_fx.ir.liveness import mark
from ppcl_fx.passes.contract import Pass, Pipeline, Refused, Result, options
from ppcl_fx.passes.edits.depth import CutDepth, Depth
from ppcl_fx.passes.edits.ffn import Ffn
from ppcl_fx.passes.edits.outline import Inline, Outline
from ppcl_fx.passes.edits.plug import Plug
from ppcl_fx.passes.edits.text_stream import TextStream
from ppcl_fx.passes.lowering.dead_code import DeadCode
from ppcl_fx.passes.lowering.expand import Expand
from ppcl_fx.passes.lowering.narrow import Narrow
from ppcl_fx.tracing import bind, trace
from ppcl_fx.tracing.guards import guards
from tests import models, toys

PASSES = [
    CutDepth("b", 0, 1),
    DeadCode(),
    Depth("b", 0, 1),
    Expand(),
    Ffn("b", 0),
    Inline(),
    Narrow(),
    Outline(),
    Plug(),
    TextStream("b", 0, 1),
]


class Two(nn.Module):
    """One result that is used and one that is not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x + 1`` and forget ``x * 2``."""
        _ = x * 2
        return x + 1


def graph() -> GraphModule:
    return torch.fx.symbolic_trace(Two())


@dataclass(frozen=True)
class Says(Pass, name="says", kind="rewrite", numerics="exact"):
    """Erase the unused node, or not, and say what one is told to say."""

    erases: bool = True
    says: bool = True

    def apply(self, gm: GraphModule) -> Result:
        for node in list(gm.graph.nodes):
            if self.erases and node.op == "call_function" and not node.users:
                gm.graph.erase_node(node)
        return Result(gm, self.says, (Refused("edit", "why", ("mul",)),), {"old": "new"})


@dataclass(frozen=True)
class Annotates(Pass, name="annotates", kind="analysis", numerics="exact"):
    """Write on the nodes and nowhere else."""

    def apply(self, gm: GraphModule) -> Result:
        for node in gm.graph.nodes:
            node.meta["ppcl"] = 1
        return Result(gm, False)


@dataclass(frozen=True)
class Breaks(Pass, name="breaks", kind="rewrite", numerics="exact"):
    """Leave a graph that does not lint: a node before the one that it reads."""

    def apply(self, gm: GraphModule) -> Result:
        mul, add = [n for n in gm.graph.nodes if n.op == "call_function"]
        mul.args = (add, 2)
        return Result(gm, True)


@pytest.mark.parametrize("pass_", PASSES, ids=lambda p: p.name)
def test_passes_are_frozen_dataclasses_with_a_kebab_case_name(pass_: Pass) -> None:
    assert dataclasses.is_dataclass(pass_)
    assert pass_.name
    assert pass_.name == pass_.name.lower().replace("_", "-")
    assert pass_.numerics in ("exact", "approximate")
    assert type(pass_)(**options(pass_)) == pass_
    field = next(iter(options(pass_)), "name")
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(pass_, field, None)


def test_names_are_unique() -> None:
    assert len({pass_.name for pass_ in PASSES}) == len(PASSES)


def test_the_truth_about_modified_is_accepted() -> None:
    result = Pipeline([Says(), Says(erases=True, says=False), Annotates()], debug=True)(graph())
    assert result.modified
    assert [n.op for n in result.graph_module.graph.nodes] == ["placeholder", "call_function", "output"]
    assert torch.equal(result.graph_module(torch.ones(2)), torch.full((2,), 2.0))


@pytest.mark.parametrize(
    ("pass_", "words"),
    [
        (Says(erases=True, says=False), "says says modified=False, but its graph changed"),
        (Says(erases=False, says=True), "says says modified=True, but its graph did not change"),
    ],
)
def test_debug_mode_catches_a_lie(pass_: Pass, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        Pipeline([pass_], debug=True)(graph())
    Pipeline([pass_])(graph())


def test_refusals_and_names_of_all_passes_are_collected() -> None:
    result = Pipeline([Says(), Annotates(), Says(says=False)])(graph())
    assert [r.reason for r in result.refused] == ["why", "why"]
    assert result.names == {"old": "new"}


def test_what_changed_something_is_recorded_with_its_options() -> None:
    gm = Pipeline([Says(), Annotates(), Says(erases=False, says=False)])(graph()).graph_module
    (record,) = gm.meta["ppcl"]["passes"]
    assert record["name"] == "says"
    assert record["options"] == {"erases": True, "says": True}
    assert record["version"]


def test_a_graph_that_does_not_lint_is_refused() -> None:
    with pytest.raises(RuntimeError, match="was used before it has been defined"):
        Breaks()(graph())


def test_the_convention_is_that_of_torch_s_own_pass_manager() -> None:
    manager = PassManager([Says(), Annotates()])
    gm = graph()
    assert len(manager(gm).graph_module.graph.nodes) == 3


def test_a_failing_precondition_stops_the_pass() -> None:
    @dataclass(frozen=True)
    class Never(Pass, name="never", kind="rewrite", numerics="exact"):
        def requires(self, gm: GraphModule) -> None:
            raise PpclError(f"no use on {len(gm.graph.nodes)} nodes")

    with pytest.raises(PpclError, match="no use on 4 nodes"):
        Pipeline([Never()])(graph())


def unused(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op == "call_method" and n.target == "tanh"]


def test_dead_code_goes_and_the_rest_stays_to_the_bit() -> None:
    gm = trace(toys.build(toys.Toy), toys.example())
    expected = gm(**toys.example())[0]
    assert not DeadCode()(gm).modified
    with gm.graph.inserting_before(gm.graph.output_node()):
        dead = gm.graph.call_method("tanh", (next(iter(gm.graph.nodes)),))
        dead.meta["val"] = None
    assert len(unused(gm)) == 1
    assert Pipeline([DeadCode()], debug=True)(gm).modified
    assert unused(gm) == []
    assert torch.equal(gm(**toys.example())[0], expected)


def test_dead_code_keeps_guards_of_what_stays() -> None:
    gm = trace(*models.tiny_qwen(blocks=2))
    mark(gm)  # the last block's text output, which nothing uses, stays with its guard
    before = len(guards(gm))
    DeadCode()(gm)
    assert len(guards(gm)) == before > 3
    # Without it the guard on its dtype has nothing to look at.
    DeadCode(sinks=False)(gm)
    assert len(guards(gm)) == before - 1
    assert len(gm(**bind(gm, models.qwen_kwargs()))) == 1
