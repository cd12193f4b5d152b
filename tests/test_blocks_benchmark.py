"""The benchmark that writes what each block costs: cut graphs compute what uncut ones do, each cost has its place."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import blocks as benchmark
from ppcl_fx.ir.stacks import stacks
from ppcl_fx.model.rewrite import insert_edits
from ppcl_fx.passes.edits.plug import plugged
from ppcl_fx.schema.costs import Costs
from ppcl_fx.schema.plan import FfnEdit, Plan
from ppcl_fx.tracing import bind, trace
from tests import models
from tests.shapes_folder import save_pipeline


@pytest.mark.parametrize("build", [models.tiny_qwen, models.tiny_flux])
def test_a_cut_graph_computes_what_the_uncut_one_does(build: Callable[[], tuple[nn.Module, models.Kwargs]]) -> None:
    model, call = build()
    gm = trace(model, call)
    found = stacks(gm)
    made = benchmark.edits_of(gm, found, span=3)
    paths = {block.path for stack in found for block in stack.blocks}
    for kind in benchmark.KINDS:
        plan = Plan(edits=made.edits[kind])
        assert plan.edits or kind == "whole"
        cut = benchmark.cut(gm, found, plan.edits)
        assert [owner for owner in cut.owners if owner] == [b.path for s in found for b in s.blocks]
        assert made.blocks[kind] <= paths
        with torch.no_grad():
            expected = plugged(insert_edits(gm, plan), frozenset(plan.ids))(**bind(gm, call))
            assert torch.equal(cut.gm(**bind(gm, call))[0], expected[0])


def test_each_cost_is_that_of_its_block() -> None:
    """By a clock that goes one second at each look: whatever is timed, each block is one piece and takes a second."""
    model, call = models.tiny_qwen()
    gm = trace(model, call)
    ticks = itertools.count()
    costs = benchmark.measure(gm, call, repeats=1, span=3, model="m", clock=lambda: float(next(ticks)))
    (stack,) = costs.stacks
    assert (stack.path, stack.first, len(stack.blocks)) == ("transformer_blocks", 0, 6)
    assert all(block.whole == block.ffn == 1000 for block in stack.blocks)
    assert stack.blocks[0].text is stack.blocks[0].text_last is stack.blocks[0].text_last_ffn is None
    assert all(block.text == block.text_last == block.text_last_ffn == 1000 for block in stack.blocks[1:-1])
    # The last block ends any group; nothing reads its text, so it is not like the others.
    assert stack.blocks[-1].text is None and stack.blocks[-1].text_last == 1000
    assert costs.rest == 2000 and costs.total == 8000 and costs.forward == 1000
    assert costs.inputs["hidden_states"] == list(call["hidden_states"].shape)


def test_edits_stay_within_the_span() -> None:
    gm = trace(*models.tiny_flux())
    made = benchmark.edits_of(gm, stacks(gm), span=2)
    assert [edit.block for edit in made.edits["ffn"] if isinstance(edit, FfnEdit)] == [2, 3]
    assert [edit.id for edit in made.edits["text"]] == ["text_stream:transformer_blocks.1-3"]
    assert [edit.id for edit in made.edits["text_last"]] == ["text_stream:transformer_blocks.2-3"]


def test_the_program_writes_a_file_that_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pipeline(tmp_path / "model", blocks=3)
    path = benchmark.main([str(tmp_path / "model"), "--repeats", "1", "--out", str(tmp_path / "costs.json")])
    costs = Costs.load(path)
    assert len(costs.stacks[0].blocks) == 3 and len(costs.model) == 64 and costs.machine["device"] == "cpu"
    assert "uncut" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        benchmark.main([str(tmp_path / "model"), "--call", "9", "--out", str(tmp_path / "costs.json")])
    assert stop.value.code == 2
    assert "--call 9: there are 2 calls, from 0" in capsys.readouterr().err
