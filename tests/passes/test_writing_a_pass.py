"""The pass that `docs/writing-a-pass.md` shows, and passes that break the contract."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager, pass_result_wrapper

from ppcl_fx.errors import PpclError
from ppcl_fx.ir.graphs import copy_graph_module
from ppcl_fx.passes.contract import REGISTRY, Pass, Pipeline, Result, as_lowering
from ppcl_fx.passes.edits.depth import CutDepth, Depth, student_path
from ppcl_fx.passes.edits.plug import plugged
from ppcl_fx.passes.registry import parse
from tests.passes.test_registry import BUILD, FORMS, base, outputs

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "writing-a-pass.md"


@pytest.fixture(scope="module")
def shown() -> Any:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.strip().splitlines()) <= 25
    names: dict[str, Any] = {"__name__": "writing_a_pass"}
    # Dataclasses look their module up.
    import sys
    import types

    sys.modules["writing_a_pass"] = types.ModuleType("writing_a_pass")
    exec(compile(code, str(PAGE), "exec"), names)  # noqa: S102
    yield names["ScaleOutput"]
    del REGISTRY["scale-output"], sys.modules["writing_a_pass"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", sorted(BUILD))
def test_the_pass_of_the_docs_runs_everywhere(shown: Any, name: str, form: str) -> None:
    gm, kwargs = base(name, form)
    expected = [2.0 * value for value in outputs(gm, kwargs)]
    ways = [
        lambda edited: Pipeline([shown(by=2.0)], debug=True)(edited).graph_module,
        lambda edited: parse("scale-output{by=2.0}")(edited).graph_module,
        lambda edited: PassManager([shown(by=2.0)])(edited).graph_module,
        lambda edited: PassManager([pass_result_wrapper(shown(by=2.0))])(edited).graph_module,
        lambda edited: as_lowering(shown(by=2.0))(edited, None),
    ]
    for way in ways:
        found = outputs(way(copy_graph_module(gm)), kwargs)
        assert len(found) == len(expected)
        assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    assert not Pipeline([shown()], debug=True)(copy_graph_module(gm)).modified


@pytest.mark.parametrize("name", sorted(BUILD))
def test_a_student_in_an_exported_graph_reads_its_own_weights(name: str) -> None:
    gm, kwargs = base(name, "exported")
    edited, edit = copy_graph_module(gm), Depth("transformer_blocks", 0, 1)
    assert edit(edited).modified
    view = plugged(edited, frozenset([edit.edit.id]))
    cut = copy_graph_module(gm)
    CutDepth("transformer_blocks", 0, 1)(cut)
    before = outputs(view, kwargs)[0]
    assert torch.equal(before, outputs(cut, kwargs)[0])
    teacher = outputs(edited, kwargs)[0]
    student = edited.get_submodule(student_path(edit.edit))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(outputs(view, kwargs)[0], before)
    assert torch.equal(outputs(edited, kwargs)[0], teacher)
    targets = {str(node.target) for node in view.graph.find_nodes(op="get_attr")}
    assert not [target for target in targets if target.startswith("transformer_blocks.0.")]


def test_a_graph_without_its_weights_is_refused() -> None:
    model, kwargs = BUILD["sd3"]()
    given = {key: value for key, value in kwargs.items() if value is not None}
    lifted = torch.export.export(model, (), given, strict=False).graph_module
    with pytest.raises(PpclError, match="among its inputs; edit what ExportedProgram.module"):
        Depth("transformer_blocks", 0, 1)(lifted)


def test_depth_edits_that_overlap_are_refused() -> None:
    gm = copy_graph_module(base("qwen", "traced")[0])
    Depth("transformer_blocks", 0, 2)(gm)
    with pytest.raises(PpclError, match=r"depth:transformer_blocks.0-2 has edited a block of it already"):
        Depth("transformer_blocks", 2, 3)(gm)


def test_a_class_without_its_declaration_or_with_a_name_that_is_taken_is_an_error() -> None:
    with pytest.raises(TypeError, match="missing 3 required keyword-only arguments"):
        type("Silent", (Pass,), {})
    for said, words in (
        ({"name": "Silent"}, "kebab case"),
        ({"kind": "edit"}, "'edit' is none of analysis, rewrite"),
        ({"numerics": "roughly"}, "'roughly' is none of exact, approximate"),
        ({"name": "cut-depth"}, "is called 'cut-depth' already"),
    ):
        with pytest.raises(TypeError, match=words):
            type("Silent", (Pass,), {}, **({"name": "silent", "kind": "rewrite", "numerics": "exact"} | said))  # type: ignore[call-overload]
    assert "silent" not in REGISTRY


@dataclass(frozen=True)
class Quiet(Pass, name="quiet", kind="analysis", numerics="exact"):
    """Edit the graph although it is an analysis."""

    def apply(self, gm: GraphModule) -> Result:
        with gm.graph.inserting_before(gm.graph.output_node()):
            gm.graph.call_function(torch.neg, (next(iter(gm.graph.nodes)),))
        return Result(gm, False)


@dataclass(frozen=True)
class Halves(Pass, name="halves", kind="rewrite", numerics="approximate"):
    """Change a weight and no node."""

    says: bool = True

    def apply(self, gm: GraphModule) -> Result:
        with torch.no_grad():
            next(gm.parameters()).mul_(0.5)
        return Result(gm, self.says)


def test_an_analysis_that_edits_and_a_weight_that_changes_are_seen() -> None:
    linear = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(RuntimeError, match="quiet is an analysis, but it changed the graph"):
        Pipeline([Quiet()], debug=True)(copy_graph_module(linear))
    assert Pipeline([Halves()], debug=True)(linear).modified
    with pytest.raises(RuntimeError, match="halves says modified=False, but its weights changed"):
        Pipeline([Halves(says=False)], debug=True)(linear)


def test_a_pipeline_is_a_pass_and_is_what_its_members_are() -> None:
    text = "cut-depth{stack=transformer_blocks,first=3,last=5},dead-code{sinks=false},plug{students=a+b},narrow"
    pipeline = parse(text)
    assert str(pipeline) == text
    assert parse(str(pipeline)) == pipeline
    assert (pipeline.kind, pipeline.numerics) == ("rewrite", "approximate")
    assert parse("dead-code,drop-guards").numerics == "exact"
    assert Pipeline([Quiet()]).kind == "analysis"
    gm = copy_graph_module(base("qwen", "traced")[0])
    assert isinstance(Pipeline([parse("dead-code"), CutDepth("transformer_blocks", 0, 1)])(gm), PassResult)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cut-dept", "did you mean 'cut-depth'"),
        ("cut-depth{stak=b}", "did you mean 'stack'"),
        ("cut-depth{stack=b,first=x,last=1}", "first=x: Input should be a valid integer"),
        ("cut-depth{stack=b,first=1}", "needs the option last: int"),
        ("depth{stack=b,first=1,last=2,init=mid}", "Input should be 'first' or 'middle'"),
        ("linear-probes", "make it in Python"),
        ("narrow{", "cannot be read from"),
    ],
)
def test_a_text_that_is_no_pipeline_is_told_in_one_line(text: str, words: str) -> None:
    with pytest.raises(PpclError, match=words):
        parse(text)
