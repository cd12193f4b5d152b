"""Text-stream projectors: the exact arithmetic, what vanishes, exact counts, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from ppcl_fx.errors import Refusal
from ppcl_fx.ir.graphs import copy_graph_module, parameter_count
from ppcl_fx.ir.switches import switches
from ppcl_fx.model.rewrite import insert_edits
from ppcl_fx.passes.contract import Pipeline
from ppcl_fx.passes.edits.ffn import Ffn, projector_path
from ppcl_fx.passes.edits.plug import plugged
from ppcl_fx.passes.edits.text_stream import TextStream
from ppcl_fx.schema.plan import FfnEdit, Plan, TextStreamEdit
from ppcl_fx.tracing import bind, trace
from tests import models
from tests.passes.by_hand import Parts, by_hand, randomise

D = models.WIDTH
STACK = "transformer_blocks"
PROJECTOR = D * D + D
MODULATION = 6 * PROJECTOR
FEED_FORWARD = (4 * D * D + 4 * D) + (4 * D * D + D)
TO_ADD_OUT = D * D + D
SAVED = MODULATION + FEED_FORWARD + TO_ADD_OUT - PROJECTOR  # by each block; the last one spends a projector more
Traced = dict[str, tuple[Any, dict[str, Any], GraphModule]]


@pytest.fixture(scope="module")
def traced() -> Traced:
    found: Traced = {}
    for name, build in (("qwen", models.tiny_qwen), ("flux", models.tiny_flux), ("sd3", models.tiny_sd3)):
        model, kwargs = build()
        found[name] = (model, kwargs, trace(model, kwargs))
    return found


def edited(gm: GraphModule, source: int, last: int) -> tuple[GraphModule, GraphModule, str]:
    """Return the pluggable graph with random projectors, the plugged one, and the edit's id."""
    pluggable = copy_graph_module(gm)
    pass_ = TextStream(STACK, source, last)
    assert Pipeline([pass_], debug=True)(pluggable).modified
    randomise(pluggable)
    return pluggable, plugged(pluggable, frozenset([pass_.edit.id])), pass_.edit.id


def group(pluggable: GraphModule, edit: str, source: int, last: int) -> dict[int, Parts]:
    parts = {source: Parts(is_source=True)}
    for index in range(source + 1, last + 1):
        key = f"{STACK}_{index}"
        parts[index] = Parts(z=pluggable.get_submodule(projector_path(edit, f"{key}.z")))
    parts[last].state = pluggable.get_submodule(projector_path(edit, f"{STACK}_{last}.state"))
    return parts


@pytest.mark.parametrize(("source", "last"), [(1, 2), (0, 3), (3, 5)])
def test_the_arithmetic_is_that_of_the_released_models(traced: Traced, source: int, last: int) -> None:
    model, kwargs, gm = traced["qwen"]
    pluggable, view, edit = edited(gm, source, last)
    expected = by_hand(model, group(pluggable, edit, source, last))
    for given in (kwargs, models.other_kwargs(model)):
        with torch.no_grad():
            reference = expected(**given)[0]
            assert torch.equal(view(**bind(view, given))[0], reference)
            assert torch.equal(pluggable(**bind(pluggable, given))[0], model(**given)[0])
            assert not torch.allclose(reference, model(**given)[0], atol=1e-3)


def test_a_feed_forward_of_a_textless_block_is_replaced_in_the_image_stream(traced: Traced) -> None:
    model, kwargs, gm = traced["qwen"]
    text, ffn = TextStreamEdit(stack=STACK, source=2, last=4), FfnEdit(stack=STACK, block=3)
    for edits in ([text, ffn], [ffn, text]):
        pluggable = insert_edits(gm, Plan(edits=edits))
        randomise(pluggable)
        view = plugged(pluggable, frozenset([text.id, ffn.id]))
        parts = group(pluggable, text.id, 2, 4)
        parts[3].ffn = {"image": pluggable.get_submodule(projector_path(ffn.id, "image"))}
        with torch.no_grad():
            assert torch.equal(view(**bind(view, kwargs))[0], by_hand(model, parts)(**kwargs)[0])
        saved = 2 * SAVED - PROJECTOR + FEED_FORWARD + MODULATION // 2 - PROJECTOR
        assert parameter_count(view) == sum(p.numel() for p in model.parameters()) - saved


def test_what_the_text_stream_needed_is_gone_and_the_attention_stays(traced: Traced) -> None:
    _, _, gm = traced["qwen"]
    _, view, _ = edited(gm, 3, 5)
    for block in (f"{STACK}.4.", f"{STACK}.5."):
        names = {name.removeprefix(block) for name in view.state_dict() if name.startswith(block)}
        assert not [name for name in names if name.startswith(("txt_mod", "txt_mlp"))]
        kept = {name.removeprefix("attn.") for name in names if name.startswith("attn.")}
        assert {"add_q_proj.weight", "add_k_proj.weight", "add_v_proj.bias", "norm_added_q.weight"} <= kept
        assert "to_add_out.weight" not in kept
    assert f"{STACK}.3.attn.to_add_out.weight" in view.state_dict()


@pytest.mark.parametrize(
    ("name", "source", "last"), [("qwen", 3, 5), ("qwen", 0, 1), ("flux", 1, 3), ("sd3", 3, 5), ("sd3", 4, 6)]
)
def test_the_count_is_arithmetic(traced: Traced, name: str, source: int, last: int) -> None:
    model, kwargs, gm = traced[name]
    pluggable, view, edit = edited(gm, source, last)
    total = sum(p.numel() for p in model.parameters())
    blocks = last - source
    assert parameter_count(view) == total - blocks * SAVED + PROJECTOR
    assert sum(p.numel() for p in view.parameters()) == parameter_count(view)
    assert len(switches(pluggable, edit)) == 2 * blocks
    for given in (kwargs, models.other_kwargs(model)):
        assert view(**bind(view, given))[0].isfinite().all()
        with torch.no_grad():
            assert torch.equal(pluggable(**bind(pluggable, given))[0], model(**given)[0])


def test_it_is_inserted_once(traced: Traced) -> None:
    gm = copy_graph_module(traced["qwen"][2])
    Pipeline([TextStream(STACK, 1, 3)], debug=True)(gm)
    assert not Pipeline([TextStream(STACK, 1, 3)], debug=True)(gm).modified


@pytest.mark.parametrize(
    ("name", "pass_", "words"),
    [
        ("flux", TextStream("single_transformer_blocks", 0, 1), "no argument computed from the text stream alone"),
        ("sd3", TextStream(STACK, 6, 7), r"transformer_blocks\.7 has no text stream of its own"),
        ("qwen", TextStream(STACK, 4, 6), r"no block transformer_blocks\.6"),
        ("qwen", Ffn("blocks", 0), r"no block blocks\.0"),
    ],
)
def test_blocks_without_a_text_stream_are_refused(traced: Traced, name: str, pass_: Any, words: str) -> None:
    gm = copy_graph_module(traced[name][2])
    before = [node.name for node in gm.graph.nodes]
    with pytest.raises(Refusal, match=words):
        pass_(gm)
    assert [node.name for node in gm.graph.nodes] == before
