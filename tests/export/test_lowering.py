"""Lowered graphs give what the models give, to the bit, also on other shapes; positions are inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ppcl_fx.calls.store import Call, Calls
from ppcl_fx.errors import PpclError
from ppcl_fx.export import DropGuards, PositionsAsInputs, TuplesApart, lower
from ppcl_fx.export.onnx.dynamic_axes import find_axes, resized, variants, widened
from ppcl_fx.export.onnx.graph_run import run_graph
from ppcl_fx.export.onnx.segments import Translations, segments
from ppcl_fx.export.onnx.writer import call_of, in_type, prepare, save, translated
from ppcl_fx.export.verify.twin import compare
from ppcl_fx.ir.graphs import copy_graph_module
from ppcl_fx.model.retrace import with_weights
from ppcl_fx.model.rewrite import rewrite
from ppcl_fx.passes.contract import Pipeline
from ppcl_fx.passes.lowering.complex_to_real import complex_nodes
from ppcl_fx.passes.lowering.positions import position_nodes, tables
from ppcl_fx.schema.plan import Plan, TextStreamEdit
from ppcl_fx.tracing import bind, trace
from ppcl_fx.tracing.guards import guards
from tests import models

pytestmark = pytest.mark.slow

Tiny = tuple[nn.Module, dict[str, Any]]


def test_lowered_equals_the_model_on_both_shapes(tiny: Tiny) -> None:
    model, kwargs = tiny
    gm = trace(model, kwargs)
    lowered = lower(gm)
    for call in (kwargs, models.other_kwargs(model)):
        with torch.no_grad():
            expected = model(**call)[0]
        assert torch.equal(run_graph(lowered.graph, lowered.feeds(bind(gm, call)))[0], expected)


def test_lowering_leaves_the_original(tiny: Tiny) -> None:
    gm = trace(*tiny)
    before = str(gm.graph)
    lowered = lower(gm)
    assert str(gm.graph) == before
    assert guards(lowered.graph) == []
    assert complex_nodes(lowered.graph) == set()
    last = [dict(p)["name"] for p in lowered.graph.meta["ppcl"]["passes"]][-1]
    assert last in ("dead-code", "complex-to-real", "einsum-to-permute")


def test_inputs_are_tensors_only(tiny_qwen: Tiny, tiny_flux: Tiny, tiny_sd3: Tiny) -> None:
    assert lower(trace(*tiny_qwen)).inputs == (
        "hidden_states", "encoder_hidden_states", "timestep", "image_rotary", "text_rotary",
    )  # fmt: skip
    sd3 = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    assert lower(trace(*tiny_sd3)).inputs == sd3
    assert lower(trace(*tiny_flux)).inputs == (*sd3, "img_ids", "txt_ids", "guidance")


def test_position_tables_are_real_views(tiny_qwen: Tiny) -> None:
    model, kwargs = tiny_qwen
    gm = trace(model, kwargs)
    lowered = lower(gm)
    found = tables(lowered.graph, bind(gm, kwargs))
    image, text = model.pos_embed(kwargs["img_shapes"], max_txt_seq_len=5, device=torch.device("cpu"))
    assert torch.equal(found["image_rotary"], torch.view_as_real(image))
    assert torch.equal(found["text_rotary"], torch.view_as_real(text))


def test_positions_pass_alone_is_exact_and_idempotent(tiny_qwen: Tiny) -> None:
    model, kwargs = tiny_qwen
    gm = trace(model, kwargs)
    view = copy_graph_module(gm)
    first = Pipeline([TuplesApart(), PositionsAsInputs()], debug=True)(view)
    assert first.modified and not first.refused
    assert position_nodes(view) == set()
    call = bind(gm, kwargs)
    with torch.no_grad():
        expected = model(**kwargs)[0]
    assert torch.equal(run_graph(view, {**call, **tables(view, call)})[0], expected)
    assert not Pipeline([TuplesApart(), PositionsAsInputs()], debug=True)(view).modified


def test_tensor_positions_stay_as_they_are(tiny_flux: Tiny) -> None:
    gm = trace(*tiny_flux)
    assert not PositionsAsInputs()(gm).modified


def test_python_number_among_tensors_is_refused() -> None:
    def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor

    gm = torch.fx.symbolic_trace(scaled)
    for node in gm.graph.nodes:
        node.meta["val"] = {"x": torch.empty(2, device="meta"), "factor": 2.0}.get(node.name)
    result = PositionsAsInputs()(gm)
    assert not result.modified
    assert result.refused[0].nodes == ("factor",)
    with pytest.raises(PpclError, match="a Python value is used together with tensors"):
        lower(gm)


def test_missing_position_argument_is_named(tiny_qwen: Tiny) -> None:
    gm = trace(*tiny_qwen)
    call = bind(gm, tiny_qwen[1])
    del call["img_shapes"]
    with pytest.raises(PpclError, match="need the argument 'img_shapes'"):
        lower(gm).feeds(call)


def test_drop_guards_removes_all_and_nothing_else(tiny: Tiny) -> None:
    gm = trace(*tiny)
    count, all_nodes = len(guards(gm)), len(gm.graph.nodes)
    assert count > 0
    result = Pipeline([DropGuards()], debug=True)(gm)
    assert result.modified
    assert len(gm.graph.nodes) == all_nodes - count
    assert not Pipeline([DropGuards()], debug=True)(gm).modified


def test_tuples_apart_leaves_one_getitem_for_each_item(tiny: Tiny) -> None:
    model, kwargs = tiny
    gm = trace(model, kwargs)
    with torch.no_grad():
        expected = model(**kwargs)[0]
    Pipeline([DropGuards(), TuplesApart()], debug=True)(gm)
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_module" and isinstance(value, tuple):
            assert all(user.target.__name__ == "getitem" for user in node.users)
            assert len({user.args[1] for user in node.users}) == len(node.users)
    assert torch.equal(run_graph(gm, bind(gm, kwargs))[0], expected)
    assert not Pipeline([TuplesApart()], debug=True)(gm).modified


EXPECTED_AXES = {
    "qwen": {"batch": (2, 3), "hidden_states_1": (16, 36), "encoder_hidden_states_1": (5, 21)},
    "flux": {"batch": (2, 3), "hidden_states_1": (16, 32), "encoder_hidden_states_1": (5, 21)},
    "sd3": {
        "batch": (2, 3),
        "hidden_states_2": (8, 24),
        "hidden_states_3": (8, 24),
        "encoder_hidden_states_1": (5, 21),
    },
}


@pytest.mark.parametrize("name", EXPECTED_AXES)
def test_axes_are_found_by_trying(name: str) -> None:
    model, kwargs = getattr(models, f"tiny_{name}")()
    gm = trace(model, kwargs)
    lowered = lower(gm)
    call = bind(gm, kwargs)
    axes = find_axes(gm, lowered.graph, call, 2)
    assert {axis.name: (axis.size, axis.other) for axis in axes} == EXPECTED_AXES[name]
    shapes = variants(call, axes)
    assert list(shapes) == ["traced", *(f"{axis.name}={axis.other}" for axis in axes), "all"]
    for shape in shapes.values():
        with torch.no_grad():
            expected = model(**shape, return_dict=False)[0]
        assert torch.equal(run_graph(lowered.graph, lowered.feeds(shape))[0], expected)


def test_ids_change_with_the_tokens_they_belong_to(tiny_flux: Tiny) -> None:
    gm = trace(*tiny_flux)
    axes = {axis.name: axis for axis in find_axes(gm, lower(gm).graph, bind(gm, tiny_flux[1]), 2)}
    assert axes["hidden_states_1"].dims == (("hidden_states", 1), ("img_ids", 0))
    assert axes["encoder_hidden_states_1"].dims == (("encoder_hidden_states", 1), ("txt_ids", 0))


def test_a_single_sample_becomes_two() -> None:
    call = widened({"x": torch.rand(1, 4), "shapes": [(1, 2, 2)], "ids": torch.zeros(4, 3)}, 1)
    assert call["x"].shape == (2, 4)
    assert call["shapes"] == [(1, 2, 2), (1, 2, 2)]
    assert call["ids"].shape == (4, 3)


def test_resizing_is_deterministic(tiny_qwen: Tiny) -> None:
    gm = trace(*tiny_qwen)
    call = bind(gm, tiny_qwen[1])
    axis = find_axes(gm, lower(gm).graph, call, 2)[1]
    one, two = resized(call, axis), resized(call, axis)
    assert torch.equal(one["hidden_states"], two["hidden_states"])
    assert one["img_shapes"] == [[(1, 6, 6)]] * 2


def test_another_type_lowers_like_its_own(tiny: Tiny) -> None:
    model, kwargs = tiny
    gm = trace(model, kwargs)
    calls = Calls([Call(kwargs=kwargs, prompts=("a",), timestep=0.5, index=0, batch=2)])
    fresh = in_type(gm, Plan(), torch.bfloat16, calls)
    assert fresh is not None
    typed = with_weights(fresh, gm)
    call, batch = call_of(typed, calls)
    assert batch == 2
    assert {p.dtype for p in typed.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in gm.parameters()} == {torch.float32}
    lowered = lower(typed)
    result = run_graph(lowered.graph, lowered.feeds(call))[0]
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, run_graph(typed, call)[0])
    assert in_type(gm, Plan(), torch.float32, calls) is None


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("sd3", {"hidden_states_2": (18, 2), "hidden_states_3": (18, 2)}), ("flux", {"hidden_states_1": (17, 1)})],
)
def test_calls_of_a_single_patch_are_translated_with_more(name: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    """A size of one inside the graph would be taken for a constant; the file serves one patch and many."""
    model, _ = getattr(models, f"tiny_{name}")()
    patch = 2 if name == "sd3" else 1
    kwargs = getattr(models, f"{name}_kwargs")(height=patch, width=patch)
    gm = trace(model, kwargs)
    prepared = prepare(gm, bind(gm, kwargs), 2)
    assert {axis.name: (axis.size, axis.other) for axis in prepared.axes}.items() >= sizes.items()
    shapes = [tuple(call["hidden_states"].shape) for call in prepared.calls.values()]
    assert any(shape[1 if name == "flux" else 2] == patch for shape in shapes)
    save(translated(prepared, Translations()), tmp_path / "one.onnx", embed=True)
    differences, _ = compare(prepared, tmp_path / "one.onnx")
    assert max(differences.values()) < 1e-5


@pytest.mark.parametrize("build", [models.tiny_qwen, models.tiny_flux, models.tiny_sd3])
def test_no_tuple_leaves_a_segment_of_a_student_without_a_text_stream(build: Any) -> None:
    """A student without a text stream reads rotations in its own block; a graph is cut between blocks."""
    edit = TextStreamEdit(stack="transformer_blocks", source=0, last=1)
    model = rewrite(trace(*build()), Plan(edits=[edit]))
    graph = lower(model.plug(students=model.edits).graph_module()).graph
    for segment in segments(graph):
        assert all(isinstance(node.meta["val"], torch.Tensor) for node in segment.outputs)
