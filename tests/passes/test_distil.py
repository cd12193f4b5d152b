"""The distillation graph: which pairs there are, what feeds the students, and what is not computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ppcl_fx.errors import PpclError
from ppcl_fx.ir.graphs import module_paths
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.model.rewrite import rewrite
from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, Plan, TextStreamEdit
from ppcl_fx.tracing import bind, trace
from ppcl_fx.train.core.distillation_graph import distil, pairs
from tests import models
from tests.passes.by_hand import randomise

STACK = "transformer_blocks"
EARLY, LATE = DepthEdit(stack=STACK, first=0, last=1), DepthEdit(stack=STACK, first=2, last=3)
FFN, TEXT = FfnEdit(stack=STACK, block=2), TextStreamEdit(stack=STACK, source=3, last=5)
Values = dict[str, dict[str, tuple[Tensor, Tensor]]]


class Collect(Interpreter):
    """Runs a distillation graph and keeps what its `pairs` nodes get."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.found: Values = {}

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Keep the terms of a `pairs` node; numbered, because a group has one of each for every block."""
        if target is not pairs:
            return super().call_function(target, args, kwargs)
        edit, terms = args
        names = [name for name, _, _ in terms]
        keys = [f"{name}{names[:i].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]
        self.found[edit] = {key: (term[1], term[2]) for key, term in zip(keys, terms, strict=True)}
        return None


def values(model: PluggableModel, stage: str, kwargs: dict[str, Any], sequential: bool = False) -> Values:
    gm = distil(model, stage, sequential)
    collect = Collect(gm)
    bound = bind(gm, kwargs)
    with torch.no_grad():
        collect.run(*(bound[str(node.target)] for node in gm.graph.nodes if node.op == "placeholder"))
    return collect.found


def perturb(model: PluggableModel, part: str) -> None:
    with torch.no_grad():
        for parameter in model.graph.get_submodule(part).parameters():
            parameter.add_(0.1)


@pytest.fixture
def depth() -> tuple[Any, PluggableModel, dict[str, Any]]:
    teacher, kwargs = models.tiny_qwen()
    model = rewrite(trace(teacher, kwargs), Plan(edits=[LATE, EARLY]))
    return teacher, model, kwargs


@pytest.fixture
def width() -> tuple[Any, PluggableModel, dict[str, Any]]:
    teacher, kwargs = models.tiny_qwen()
    model = rewrite(trace(teacher, kwargs), Plan(edits=[FFN, TEXT]))
    randomise(model.graph)
    return teacher, model, kwargs


def teacher_states(teacher: Any, kwargs: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Return what leaves each block of the teacher."""
    seen: list[dict[str, Tensor]] = []
    handles = [
        block.register_forward_hook(lambda m, a, result: seen.append({"text": result[0], "image": result[1]}))
        for block in teacher.transformer_blocks
    ]
    with torch.no_grad():
        teacher(**kwargs)
    for handle in handles:
        handle.remove()
    return seen


def test_depth_pairs_a_student_s_streams_with_the_last_block_s(depth: Any) -> None:
    teacher, model, kwargs = depth
    found = values(model, "depth", kwargs)
    # In the order of computation, whatever the order of the plan.
    assert list(found) == [EARLY.id, LATE.id]
    states = teacher_states(teacher, kwargs)
    for edit in (EARLY, LATE):
        assert set(found[edit.id]) == {"image", "text"}
        for stream, (student, target) in found[edit.id].items():
            assert torch.equal(target, states[edit.last][stream])
            # An untrained student is block `first`, fed by that block's inputs.
            assert torch.equal(student, states[edit.first][stream])


def test_a_student_is_fed_by_the_teacher_unless_told_otherwise(depth: Any) -> None:
    _, model, kwargs = depth
    apart, chained = values(model, "depth", kwargs), values(model, "depth", kwargs, sequential=True)
    perturb(model, "students.transformer_blocks_0_1")
    apart_after, chained_after = values(model, "depth", kwargs), values(model, "depth", kwargs, sequential=True)
    for stream in ("image", "text"):
        assert not torch.equal(apart[EARLY.id][stream][0], apart_after[EARLY.id][stream][0])
        assert torch.equal(apart[LATE.id][stream][0], apart_after[LATE.id][stream][0])
        assert not torch.equal(chained[LATE.id][stream][0], chained_after[LATE.id][stream][0])
        for before, after in ((apart, apart_after), (chained, chained_after), (apart, chained)):
            for edit in (EARLY.id, LATE.id):
                assert torch.equal(before[edit][stream][1], after[edit][stream][1])  # the targets are the teacher's


def test_what_comes_after_the_last_interval_is_not_computed(depth: Any) -> None:
    _, model, _ = depth
    for sequential in (False, True):
        gm = distil(model, "depth", sequential)
        paths = {path for node in gm.graph.nodes for path in module_paths(node)}
        assert not paths & {f"{STACK}.4", f"{STACK}.5", "proj_out", "norm_out"}
        assert {f"{STACK}.3", "students.transformer_blocks_2_3"} <= paths
        gm.graph.lint()


def calls(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.op == "call_module"]


def test_each_value_is_computed_once(depth: Any) -> None:
    _, model, _ = depth
    targets = [str(node.target) for node in calls(distil(model, "depth"))]
    assert targets.count(f"{STACK}.1.attn") == 1
    assert targets.count("students.transformer_blocks_2_3.attn") == 1
    # Fed by students, the targets still need the teacher's own chain.
    chained = [str(node.target) for node in calls(distil(model, "depth", sequential=True))]
    assert sorted(chained) == sorted(targets)


def test_width_pairs_block_ends_and_projectors(width: Any) -> None:
    teacher, model, kwargs = width
    found = values(model, "width", kwargs)
    assert list(found) == [FFN.id, TEXT.id]
    assert set(found[FFN.id]) == {"image", "text", "linear.image", "linear.text"}
    # Blocks 4 and 5: each its z and its image output; the last one its text projector too.
    assert set(found[TEXT.id]) == {"image0", "z0", "image1", "z1", "linear.text"}
    states = teacher_states(teacher, kwargs)
    for stream in ("image", "text"):
        student, target = found[FFN.id][stream]
        assert torch.equal(target, states[2][stream])
        assert torch.equal(found[FFN.id][f"linear.{stream}"][0], student)
    assert torch.equal(found[TEXT.id]["image0"][1], states[4]["image"])
    assert torch.equal(found[TEXT.id]["image1"][1], states[5]["image"])
    assert torch.equal(found[TEXT.id]["linear.text"][1], states[5]["text"])
    projector = model.graph.get_submodule("projectors.text_stream_transformer_blocks_3_5")
    state = states[3]["text"] + projector.get_submodule("transformer_blocks_5.state")(states[3]["text"])
    assert torch.equal(found[TEXT.id]["linear.text"][0], state.detach())


def test_projectors_do_not_feed_each_other_unless_told_to(width: Any) -> None:
    _, model, kwargs = width
    apart, chained = values(model, "width", kwargs), values(model, "width", kwargs, sequential=True)
    perturb(model, "projectors.ffn_transformer_blocks_2")
    apart_after, chained_after = values(model, "width", kwargs), values(model, "width", kwargs, sequential=True)
    for name in apart[TEXT.id]:
        assert torch.equal(apart[TEXT.id][name][0], apart_after[TEXT.id][name][0])
        assert not torch.equal(chained[TEXT.id][name][0], chained_after[TEXT.id][name][0])
        assert torch.equal(chained[TEXT.id][name][1], apart_after[TEXT.id][name][1])


@pytest.mark.parametrize("stage", ["depth", "width"])
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_other_models_have_finite_pairs_of_one_shape(name: str, stage: str) -> None:
    teacher, kwargs = {"flux": models.tiny_flux, "sd3": models.tiny_sd3}[name]()
    edits: list[Edit] = [EARLY, FfnEdit(stack=STACK, block=2)]
    if name == "flux":
        edits.append(DepthEdit(stack="single_transformer_blocks", first=1, last=3))
    model = rewrite(trace(teacher, kwargs), Plan(edits=edits))
    for given in (kwargs, models.other_kwargs(teacher)):
        found = values(model, stage, given)
        assert list(found) == [edit.id for edit in edits if isinstance(edit, DepthEdit) == (stage == "depth")]
        for terms in found.values():
            for student, target in terms.values():
                assert student.shape == target.shape
                assert student.isfinite().all()


def test_an_unknown_or_empty_stage_is_refused(depth: Any) -> None:
    _, model, _ = depth
    with pytest.raises(PpclError, match=r"no distillation stage 'dept' \(did you mean 'depth'\?\)"):
        distil(model, "dept")
    with pytest.raises(PpclError, match="the plan has no edit for stage width"):
        distil(model, "width")
