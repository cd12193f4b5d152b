"""A ControlNet's residuals on a pluggable model: aligned with the teacher's blocks, summed for a student."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.model.rewrite import rewrite
from ppcl_fx.passes.edits.depth import CutDepth
from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, Plan
from ppcl_fx.tracing import bind, trace
from tests import models

DUAL, SINGLE = "transformer_blocks", "single_transformer_blocks"
BUILD = {"qwen": models.tiny_qwen, "flux": models.tiny_flux, "sd3": models.tiny_sd3}
LISTS = {
    "qwen": {"controlnet_block_samples": 3},
    "flux": {"controlnet_block_samples": 2, "controlnet_single_block_samples": 3},
    "sd3": {"block_controlnet_hidden_states": 4},
}
"""Name of the list of residuals -> how many there are; fewer than blocks, so the models repeat them."""
DEPTH = {
    "qwen": [DepthEdit(stack=DUAL, first=1, last=3)],
    "flux": [DepthEdit(stack=DUAL, first=1, last=2), DepthEdit(stack=SINGLE, first=1, last=3)],
    "sd3": [DepthEdit(stack=DUAL, first=0, last=2), DepthEdit(stack=DUAL, first=4, last=5)],
}
Case = tuple[str, Any, dict[str, Any], PluggableModel]


def with_control(name: str, kwargs: dict[str, Any], seed: int = 9) -> dict[str, Any]:
    """Add lists of random residuals to a call."""
    generator = torch.Generator().manual_seed(seed)
    batch = kwargs["hidden_states"].shape[0]
    tokens = kwargs["hidden_states"].shape[1] if name != "sd3" else kwargs["hidden_states"][0, 0].numel() // 4
    lists = {
        argument: [torch.randn(batch, tokens, models.WIDTH, generator=generator) for _ in range(count)]
        for argument, count in LISTS[name].items()
    }
    return {**kwargs, **lists}


class Passes(nn.Module):
    """A block that gives back what enters it, in the order of the real ones: text, image."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.context_pre_only = getattr(like, "context_pre_only", None)

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any) -> Any:
        """Return the two states."""
        return encoder_hidden_states, hidden_states


def by_hand(teacher: Any, edits: list[DepthEdit]) -> Any:
    """Return the teacher with blocks that only pass their inputs on: the model adds the residuals after each."""
    copied = copy.deepcopy(teacher)
    for edit in edits:
        blocks = getattr(copied, edit.stack)
        for index in range(edit.first + 1, edit.last + 1):
            blocks[index] = Passes(blocks[index])
    return copied


def answer(model: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        result = model(**{**kwargs, "return_dict": False})[0]
    assert isinstance(result, torch.Tensor)
    return result


@pytest.fixture(scope="module", params=list(BUILD))
def case(request: pytest.FixtureRequest) -> Case:
    name = request.param
    teacher, kwargs = BUILD[name]()
    kwargs = with_control(name, kwargs)
    return name, teacher, kwargs, rewrite(trace(teacher, kwargs), Plan(edits=list[Edit](DEPTH[name])))


def test_with_every_edit_at_the_teacher_residuals_are_the_teacher_s_to_the_bit(case: Case) -> None:
    name, teacher, kwargs, model = case
    model.plug(students=[])
    other = with_control(name, models.other_kwargs(teacher), seed=10)
    for given in (kwargs, other):
        assert torch.equal(answer(model, given), answer(teacher, given))
    without = {key: value for key, value in kwargs.items() if key not in LISTS[name]}
    assert not torch.allclose(answer(teacher, without), answer(teacher, kwargs), atol=1e-3)


def test_a_student_gets_the_sum_of_its_blocks_residuals(case: Case) -> None:
    name, teacher, kwargs, model = case
    # A new student is the interval's first block, so the reference is the teacher with the others passing through.
    for given in (kwargs, with_control(name, models.other_kwargs(teacher), seed=10)):
        for students in [[edit] for edit in model.edits] + [model.edits]:
            model.plug(students=students)
            reference = by_hand(teacher, [edit for edit in DEPTH[name] if edit.id in students])
            assert torch.equal(answer(model, given), answer(reference, given))


def test_blocks_that_are_cut_leave_their_residuals_behind(case: Case) -> None:
    name, teacher, kwargs, _ = case
    gm = trace(teacher, kwargs)
    for edit in DEPTH[name]:
        CutDepth(edit.stack, edit.first, edit.last)(gm)
    with torch.no_grad():
        assert torch.equal(gm(**bind(gm, kwargs))[0], answer(by_hand(teacher, DEPTH[name]), kwargs))


def test_a_student_with_residuals_can_lose_its_feed_forward() -> None:
    teacher, kwargs = models.tiny_qwen()
    kwargs = with_control("qwen", kwargs)
    edits: list[Edit] = [*DEPTH["qwen"], FfnEdit(stack=DUAL, block=1)]
    model = rewrite(trace(teacher, kwargs), Plan(edits=edits)).plug(students=[edit.id for edit in edits])
    # Projectors start at zero: a student without feed-forwards, and the residuals of three blocks.
    reference = by_hand(teacher, DEPTH["qwen"])
    block = reference.transformer_blocks[1]
    with torch.no_grad():
        for mlp in (block.img_mlp, block.txt_mlp):
            mlp.net[2].weight.zero_()
            mlp.net[2].bias.zero_()
    assert torch.allclose(answer(model, kwargs), answer(reference, kwargs), atol=1e-6)


def test_another_number_of_residuals_is_spread_as_the_model_spreads_it() -> None:
    teacher, kwargs = models.tiny_qwen()
    model = rewrite(trace(teacher, with_control("qwen", kwargs)), Plan(edits=list[Edit](DEPTH["qwen"])))
    model.plug(students=model.edits)
    six = {**kwargs, "controlnet_block_samples": list(torch.randn(6, 2, 16, 32, generator=torch.Generator()))}
    assert torch.equal(answer(model, six), answer(by_hand(teacher, DEPTH["qwen"]), six))


def test_a_model_is_traced_again_for_calls_with_residuals() -> None:
    teacher, kwargs = models.tiny_qwen()
    model = rewrite(trace(teacher, kwargs), Plan(edits=list[Edit](DEPTH["qwen"]))).plug(students=[])
    controlled = with_control("qwen", kwargs)
    weight = model.graph.get_parameter(f"{DUAL}.1.attn.to_q.weight")
    assert torch.equal(answer(model.retrace(**controlled), controlled), answer(teacher, controlled))
    assert model.graph.get_parameter(f"{DUAL}.1.attn.to_q.weight") is weight
    model.plug(students=model.edits)
    assert torch.equal(answer(model, controlled), answer(by_hand(teacher, DEPTH["qwen"]), controlled))
