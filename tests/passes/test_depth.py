"""Depth edits: a switchable student beside a run of blocks, and cutting a run for good."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from ppcl_fx.errors import Refusal
from ppcl_fx.ir.graphs import copy_graph_module, module_paths, parameter_count
from ppcl_fx.ir.stacks import stacks
from ppcl_fx.ir.switches import switches
from ppcl_fx.passes.contract import Pipeline
from ppcl_fx.passes.edits.depth import CutDepth, Depth, student_path
from ppcl_fx.passes.edits.plug import plugged
from ppcl_fx.tracing import bind, trace
from ppcl_fx.tracing.guards import is_guard
from tests import models

BUILD = {"qwen": models.tiny_qwen, "flux": models.tiny_flux, "sd3": models.tiny_sd3}
# Model, block list, first and last block of an interval.
CASES = [
    ("qwen", "transformer_blocks", 1, 3),
    ("qwen", "transformer_blocks", 4, 5),
    ("flux", "transformer_blocks", 0, 1),
    ("flux", "transformer_blocks", 2, 3),
    ("flux", "single_transformer_blocks", 1, 4),
    ("sd3", "transformer_blocks", 0, 2),
    ("sd3", "transformer_blocks", 3, 6),
]
Traced = dict[str, tuple[Any, dict[str, Any], GraphModule]]


@pytest.fixture(scope="module")
def traced() -> Traced:
    found: Traced = {}
    for name, build in BUILD.items():
        model, kwargs = build()
        found[name] = (model, kwargs, trace(model, kwargs))
    return found


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def shortened(model: nn.Module, stack: str, first: int, last: int) -> Any:
    shorter = copy.deepcopy(model)
    kept = [block for i, block in enumerate(shorter.get_submodule(stack)) if not first < i <= last]  # type: ignore[arg-type]
    shorter.set_submodule(stack, nn.ModuleList(kept))
    return shorter


def run_graph(gm: GraphModule, kwargs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        result = gm(**bind(gm, kwargs))[0]
    assert isinstance(result, torch.Tensor)
    return result


@pytest.mark.parametrize(("name", "stack", "first", "last"), CASES)
def test_cutting_is_exact_against_a_shortened_model(
    traced: Traced, name: str, stack: str, first: int, last: int
) -> None:
    model, kwargs, gm = traced[name]
    cut = copy_graph_module(gm)
    assert Pipeline([CutDepth(stack, first, last)], debug=True)(cut).modified
    shorter = shortened(model, stack, first, last)
    for given in (kwargs, models.other_kwargs(model)):
        with torch.no_grad():
            assert torch.equal(run_graph(cut, given), shorter(**given)[0])
    assert parameter_count(cut) == size(shorter)
    gone = {f"{stack}.{i}" for i in range(first + 1, last + 1)}
    assert not [node for node in cut.graph.nodes if gone & set(module_paths(node))]
    assert not CutDepth(stack, first, last)(cut).modified


@pytest.mark.parametrize(("name", "stack", "first", "last"), CASES)
def test_an_untrained_student_computes_what_cutting_would(
    traced: Traced, name: str, stack: str, first: int, last: int
) -> None:
    model, kwargs, gm = traced[name]
    pluggable = copy_graph_module(gm)
    edit = Depth(stack, first, last)
    blocks = next(s for s in stacks(gm) if any(b.path == f"{stack}.{first}" for b in s.blocks))
    before = len(gm.graph.nodes)
    result = Pipeline([edit], debug=True)(pluggable)
    assert result.modified
    # A copy of the block without its guards, and one switch for each stream.
    begin = next(b for b in blocks.blocks if b.index == first)
    copied = [node for node in begin.nodes if not is_guard(node)]
    assert len(pluggable.graph.nodes) == before + len(copied) + len(blocks.streams)
    assert len(switches(pluggable, edit.edit.id)) == len(blocks.streams)
    shorter = shortened(model, stack, first, last)
    view = plugged(pluggable, frozenset([edit.edit.id]))
    for given in (kwargs, models.other_kwargs(model)):
        with torch.no_grad():
            assert torch.equal(run_graph(pluggable, given), model(**given)[0])
            assert torch.equal(run_graph(view, given), shorter(**given)[0])
    removed = sum(size(model.get_submodule(f"{stack}.{i}")) for i in range(first + 1, last + 1))
    assert parameter_count(view) == size(model) - removed == size(shorter)


def test_an_inserted_edit_is_inserted_once(traced: Traced) -> None:
    gm = copy_graph_module(traced["qwen"][2])
    edit = Depth("transformer_blocks", 1, 3)
    assert edit(gm).modified
    nodes = [node.name for node in gm.graph.nodes]
    assert not Pipeline([edit], debug=True)(gm).modified
    assert [node.name for node in gm.graph.nodes] == nodes


@pytest.mark.parametrize(("init", "source"), [("first", 1), ("middle", 2)])
def test_a_student_starts_from_the_first_or_the_middle_block(traced: Traced, init: Any, source: int) -> None:
    model, _, gm = traced["qwen"]
    pluggable = copy_graph_module(gm)
    edit = Depth("transformer_blocks", 1, 4, init)
    result = edit(pluggable)
    path = student_path(edit.edit)
    assert path == "students.transformer_blocks_1_4"
    student = pluggable.get_submodule(path)
    teacher = model.get_submodule(f"transformer_blocks.{source}")
    assert student.state_dict().keys() == teacher.state_dict().keys()
    for name, weight in teacher.named_parameters():
        assert torch.equal(student.get_parameter(name), weight)
        assert student.get_parameter(name).data_ptr() != weight.data_ptr()
    assert result.names == {f"transformer_blocks.{source}.{n}": f"{path}.{n}" for n in teacher.state_dict()}
    other = model.get_submodule(f"transformer_blocks.{3 - source}")
    assert not torch.equal(student.get_parameter("attn.to_q.weight"), other.get_parameter("attn.to_q.weight"))


@pytest.mark.parametrize(
    ("name", "stack", "first", "last", "words"),
    [
        ("sd3", "transformer_blocks", 2, 3, r"leaves its stack transformer_blocks:0-2 \(blocks 0 to 2\)"),
        ("sd3", "transformer_blocks", 6, 7, r"leaves its stack transformer_blocks:3-6 \(blocks 3 to 6\)"),
        ("qwen", "transformer_blocks", 4, 6, "has no block 6; its blocks are 0 to 5"),
        ("flux", "single_transformer_block", 0, 1, "did you mean 'single_transformer_blocks'"),
    ],
)
@pytest.mark.parametrize("pass_", [Depth, CutDepth])
def test_an_interval_that_leaves_its_stack_is_refused(
    traced: Traced, name: str, stack: str, first: int, last: int, words: str, pass_: Any
) -> None:
    gm = traced[name][2]
    nodes = len(gm.graph.nodes)
    with pytest.raises(Refusal, match=words):
        pass_(stack, first, last)(gm)
    assert len(gm.graph.nodes) == nodes


def test_several_cuts_make_one_model(traced: Traced) -> None:
    model, kwargs, gm = traced["flux"]
    cut = copy_graph_module(gm)
    cuts = [CutDepth("transformer_blocks", 1, 2), CutDepth("single_transformer_blocks", 0, 1)]
    cuts.append(CutDepth("single_transformer_blocks", 2, 4))
    Pipeline(cuts, debug=True)(cut)
    shorter = shortened(model, "transformer_blocks", 1, 2)
    shorter.single_transformer_blocks = nn.ModuleList(shorter.single_transformer_blocks[i] for i in (0, 2))
    with torch.no_grad():
        assert torch.equal(run_graph(cut, kwargs), shorter(**kwargs)[0])
    assert parameter_count(cut) == size(shorter)
