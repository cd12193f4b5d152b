"""Plugging and rewriting: the teacher to the bit, every mixture runs, counts are arithmetic, and refusals."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch.fx import GraphModule

from ppcl_fx.errors import PpclError, Refusal
from ppcl_fx.ir.graphs import copy_graph_module, parameter_count
from ppcl_fx.ir.switches import switches
from ppcl_fx.model.rewrite import insert_edits, rewrite
from ppcl_fx.passes.edits.plug import count, plugged
from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, Plan, TextStreamEdit
from ppcl_fx.tracing import bind, trace
from tests import models
from tests.passes.by_hand import randomise

DUAL, SINGLE = "transformer_blocks", "single_transformer_blocks"
BUILD = {"qwen": models.tiny_qwen, "flux": models.tiny_flux, "sd3": models.tiny_sd3}
EDITS: dict[str, list[Edit]] = {
    "qwen": [
        DepthEdit(stack=DUAL, first=1, last=2),
        FfnEdit(stack=DUAL, block=0),
        FfnEdit(stack=DUAL, block=1),
        FfnEdit(stack=DUAL, block=5),
        TextStreamEdit(stack=DUAL, source=3, last=5),
    ],
    "flux": [
        DepthEdit(stack=DUAL, first=0, last=1),
        FfnEdit(stack=DUAL, block=2),
        DepthEdit(stack=SINGLE, first=1, last=3),
        TextStreamEdit(stack=DUAL, source=2, last=3),
    ],
    "sd3": [
        DepthEdit(stack=DUAL, first=0, last=1),
        FfnEdit(stack=DUAL, block=7),
        DepthEdit(stack=DUAL, first=4, last=5),
        TextStreamEdit(stack=DUAL, source=3, last=6),
    ],
}
# Eq. 13 of the paper, the intervals below block 31: 18 blocks go. The others are [42, 43] to [56, 57]: 7 blocks go.
EQ_13 = [(3, 4), (5, 7), (8, 10), (11, 12), (15, 24), (25, 27), (29, 30)]
Pluggable = tuple[Any, dict[str, Any], GraphModule, GraphModule, Plan]


@pytest.fixture(scope="module", params=list(BUILD))
def case(request: pytest.FixtureRequest) -> Pluggable:
    model, kwargs = BUILD[request.param]()
    gm = trace(model, kwargs)
    plan = Plan(edits=EDITS[request.param])
    graph = insert_edits(gm, plan)
    randomise(graph)
    return model, kwargs, gm, graph, plan


@pytest.fixture(scope="module")
def qwen() -> GraphModule:
    return trace(*models.tiny_qwen())


def test_with_nothing_plugged_it_is_the_teacher_to_the_bit(case: Pluggable) -> None:
    model, kwargs, gm, graph, _ = case
    teacher = plugged(graph, frozenset())
    for given in (kwargs, models.other_kwargs(model)):
        with torch.no_grad():
            expected = model(**given)[0]
            assert torch.equal(graph(**bind(graph, given))[0], expected)
            assert torch.equal(teacher(**bind(teacher, given))[0], expected)
    assert parameter_count(teacher) == parameter_count(gm) == sum(p.numel() for p in model.parameters())
    assert teacher.state_dict().keys() == gm.state_dict().keys()
    assert switches(teacher) == []


def test_any_mixture_runs_and_shares_the_weights(case: Pluggable) -> None:
    model, kwargs, _, graph, plan = case
    mixtures = [(edit,) for edit in plan.ids] + list(itertools.combinations(plan.ids, 2))[:2] + [tuple(plan.ids)]
    total = sum(p.numel() for p in model.parameters())
    known = {parameter.data_ptr() for parameter in graph.parameters()}
    for mixture in mixtures:
        view = plugged(graph, frozenset(mixture))
        assert parameter_count(view) == sum(p.numel() for p in view.parameters()) <= total
        # Narrowed layers are the first rows of the teacher's; dual attention cuts rows out of the middle.
        assert {p.data_ptr() for p in view.parameters()} <= known
        for given in (kwargs, models.other_kwargs(model)):
            with torch.no_grad():
                result, expected = view(**bind(view, given))[0], model(**given)[0]
            assert result.shape == expected.shape
            assert result.isfinite().all()
            # A width edit of a student changes nothing while the student is not plugged.
            assert torch.equal(result, expected) == (parameter_count(view) == total)


def test_a_mixture_does_not_depend_on_the_order_of_its_edits(case: Pluggable) -> None:
    _, kwargs, gm, graph, plan = case
    again = insert_edits(gm, plan.model_copy(update={"edits": plan.edits[::-1]}))
    one, two = (plugged(g, frozenset(plan.ids)) for g in (graph, again))
    for path, parameter in two.named_parameters():
        with torch.no_grad():
            parameter.copy_(one.get_parameter(path))
    with torch.no_grad():
        assert torch.equal(one(**bind(one, kwargs))[0], two(**bind(two, kwargs))[0])


def test_the_teacher_is_not_touched(case: Pluggable) -> None:
    model, _, gm, graph, plan = case
    assert switches(gm) == []
    assert not hasattr(gm, "students")
    assert {str(node.args[2]) for node in switches(graph)} == set(plan.ids)
    names = dict(graph.named_parameters())
    assert all(names[name] is parameter for name, parameter in model.named_parameters())


def test_edits_are_inserted_once(case: Pluggable) -> None:
    _, _, _, graph, plan = case
    again = insert_edits(graph, plan)
    assert [n.name for n in again.graph.nodes] == [n.name for n in graph.graph.nodes]
    assert again.state_dict().keys() == graph.state_dict().keys()


def test_a_plan_of_another_model_is_refused(qwen: GraphModule) -> None:
    plan = Plan(model="0" * 64, edits=EDITS["qwen"])
    with pytest.raises(PpclError, match=r"another model \(fingerprint 000000000000, this one is [0-9a-f]{12}\)"):
        rewrite(qwen, plan)
    model = rewrite(qwen, plan.model_copy(update={"model": qwen.meta["ppcl"]["model"]}))
    assert model.plan.params < model.plan.teacher_params == parameter_count(qwen)
    assert model.students == ()


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ([DepthEdit(stack=DUAL, first=1, last=3), FfnEdit(stack=DUAL, block=2)], "2 lies inside a depth interval"),
        (
            [DepthEdit(stack=DUAL, first=1, last=3), TextStreamEdit(stack=DUAL, source=2, last=4)],
            "2 lies inside a depth interval",
        ),
        (
            [DepthEdit(stack=DUAL, first=1, last=3), TextStreamEdit(stack=DUAL, source=1, last=4)],
            r"its source block 1 lies in depth:transformer_blocks\.1-3; choose a source outside",
        ),
        (
            [DepthEdit(stack=DUAL, first=2, last=4), TextStreamEdit(stack=DUAL, source=1, last=3)],
            r"ends inside depth:transformer_blocks\.2-4; let it end at 1 or 4",
        ),
        ([FfnEdit(stack=DUAL, block=6)], r"ffn:transformer_blocks\.6: the model has no block"),
        ([DepthEdit(stack=DUAL, first=4, last=6)], "has no block 6"),
        ([DepthEdit(stack=DUAL, first=1, last=3), DepthEdit(stack=DUAL, first=3, last=4)], "overlap"),
    ],
)
def test_plans_that_do_not_fit_are_refused(qwen: GraphModule, edits: list[Edit], words: str) -> None:
    before = [node.name for node in qwen.graph.nodes]
    with pytest.raises((PpclError, Refusal), match=words):
        insert_edits(qwen, Plan(edits=edits))
    assert [node.name for node in qwen.graph.nodes] == before


def test_a_text_group_may_hold_whole_intervals(qwen: GraphModule) -> None:
    edits: list[Edit] = [DepthEdit(stack=DUAL, first=2, last=3), TextStreamEdit(stack=DUAL, source=1, last=4)]
    graph = copy_graph_module(insert_edits(qwen, Plan(edits=edits)))
    view = plugged(graph, frozenset(edit.id for edit in edits))
    # Two blocks lose their text stream: the student of 2-3, and block 4.
    names = {name.split(".txt_mod")[0] for name in view.state_dict() if ".txt_mod" in name}
    assert names == {f"{DUAL}.{i}" for i in (0, 1, 5)}
    with torch.no_grad():
        assert view(**bind(view, models.qwen_kwargs()))[0].isfinite().all()


def test_qwen_image_s_plan_counts_as_the_paper_s() -> None:
    """As wide as Qwen-Image, with half of its blocks: enough for arithmetic, and quick to build."""
    blocks, block = 31, 339_831_296
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(num_layers=blocks).eval()
    total = 20_430_401_088 - (60 - blocks) * block
    gm = trace(
        model,
        {
            "hidden_states": torch.empty(1, 4096, 64, device="meta"),
            "encoder_hidden_states": torch.empty(1, 128, 3584, device="meta"),
            "timestep": torch.empty(1, device="meta"),
            "img_shapes": [[(1, 64, 64)]],
        },
    )
    assert parameter_count(gm) == total
    plan = Plan(edits=[DepthEdit(stack=DUAL, first=first, last=last) for first, last in EQ_13])
    removed = sum(last - first for first, last in EQ_13)
    assert removed == 18
    assert count(gm, plan) == total - removed * block
    # With the blocks from 31 on, of which 7 go, it is the paper's 12 B model.
    assert count(gm, plan) + (60 - blocks - 7) * block == 11_934_618_688
    width = 3072
    projector = width * width + width
    ffn = 2 * (75_512_832 + 56_641_536 // 2 - projector)
    text = 56_641_536 + 75_512_832 + projector - projector  # its mod, its MLP and to_add_out, against W_z
    plan.edits += [FfnEdit(stack=DUAL, block=13), TextStreamEdit(stack=DUAL, source=28, last=30)]
    assert count(gm, plan) == total - removed * block - ffn - text + projector
