"""A stage falls into problems: what each caches of the teacher, and what it trains."""

from __future__ import annotations

import pytest
import torch

from ppcl_fx.train.bounded.problems import Problem, problems
from ppcl_fx.train.config import Weights
from ppcl_fx.train.core.distillation_graph import train_only
from ppcl_fx.train.core.stages import Distillation
from tests.train.pluggable import build


def found(kind: str, stage: str) -> tuple[dict[str, Problem], dict[str, torch.Size]]:
    model, _ = build(kind)
    train_only(model, stage)
    values = {node.name: node.meta.get("val") for node in model.graph.graph.nodes}
    mine = problems(model, stage)
    shapes = {name: v.shape for name, v in values.items() if isinstance(v, torch.Tensor)}
    expected = Distillation(model, stage, Weights()).groups
    assert [problem.edit for problem in mine] == list(expected)
    for problem in mine:
        trained = {id(problem.graph.get_parameter(name)) for name in problem.trained}
        assert trained == {id(p) for p in expected[problem.edit]}
    return {problem.edit: problem for problem in mine}, shapes


@pytest.mark.parametrize("kind", ["qwen", "flux", "sd3"])
def test_a_depth_student_caches_two_states_of_each_stream_and_little_else(kind: str) -> None:
    mine, shapes = found(kind, "depth")
    for problem in mine.values():
        assert not problem.frozen
        large = [name for name in problem.border if name in shapes and len(shapes[name]) == 3]
        # A single-stream block reads one joint state, and its two streams are split for the loss.
        assert len(large) == (3 if "single" in problem.edit else 4), problem.border


def test_a_width_edit_brings_the_teachers_layers_that_it_goes_through() -> None:
    mine, _ = found("qwen", "width")
    ffn, text = mine["ffn:transformer_blocks.4"], mine["text_stream:transformer_blocks.4-5"]
    assert not ffn.frozen
    assert text.frozen and all(name.startswith("transformer_blocks.5.") for name in text.frozen)
    assert all(name.startswith("projectors.") for name in (*ffn.trained, *text.trained))
