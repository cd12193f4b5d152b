"""Feed-forward projectors: the exact arithmetic, the shrunk modulation, exact counts, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from ppcl_fx.errors import Refusal
from ppcl_fx.ir.graphs import copy_graph_module, parameter_count
from ppcl_fx.ir.switches import switches
from ppcl_fx.passes.contract import Pipeline
from ppcl_fx.passes.edits.ffn import Ffn, projector_path
from ppcl_fx.passes.edits.plug import plugged
from ppcl_fx.tracing import bind, trace
from tests import models
from tests.passes.by_hand import Parts, by_hand, randomise

D = models.WIDTH
STACK = "transformer_blocks"
MODULATION = 6 * (D * D + D)
FEED_FORWARD = (4 * D * D + 4 * D) + (4 * D * D + D)
PROJECTOR = D * D + D
SAVED = FEED_FORWARD + MODULATION // 2 - PROJECTOR
Traced = dict[str, tuple[Any, dict[str, Any], GraphModule]]


@pytest.fixture(scope="module")
def traced() -> Traced:
    found: Traced = {}
    for name, build in (("qwen", models.tiny_qwen), ("flux", models.tiny_flux), ("sd3", models.tiny_sd3)):
        model, kwargs = build()
        found[name] = (model, kwargs, trace(model, kwargs))
    return found


def edited(gm: GraphModule, block: int) -> tuple[GraphModule, GraphModule, str]:
    """Return the pluggable graph with random projectors, the plugged one, and the edit's id."""
    pluggable = copy_graph_module(gm)
    pass_ = Ffn(STACK, block)
    assert Pipeline([pass_], debug=True)(pluggable).modified
    randomise(pluggable)
    return pluggable, plugged(pluggable, frozenset([pass_.edit.id])), pass_.edit.id


@pytest.mark.parametrize("block", [0, 3, 5])
def test_the_arithmetic_is_that_of_the_released_models(traced: Traced, block: int) -> None:
    model, kwargs, gm = traced["qwen"]
    pluggable, view, edit = edited(gm, block)
    streams = {stream: pluggable.get_submodule(projector_path(edit, stream)) for stream in ("image", "text")}
    expected = by_hand(model, {block: Parts(ffn=streams)})
    for given in (kwargs, models.other_kwargs(model)):
        with torch.no_grad():
            reference = expected(**given)[0]
            assert torch.equal(view(**bind(view, given))[0], reference)
            assert torch.equal(pluggable(**bind(pluggable, given))[0], model(**given)[0])
            assert not torch.allclose(reference, model(**given)[0], atol=1e-3)


def test_a_projector_starts_as_the_identity(traced: Traced) -> None:
    pluggable = copy_graph_module(traced["qwen"][2])
    Ffn(STACK, 1)(pluggable)
    weights = list(pluggable.get_submodule("projectors").parameters())
    assert len(weights) == 4
    assert not any(weight.any() for weight in weights)


def test_the_modulation_keeps_the_attention_s_half_only(traced: Traced) -> None:
    model, _, gm = traced["qwen"]
    _, view, _ = edited(gm, 2)
    for name in ("img_mod", "txt_mod"):
        kept = view.get_parameter(f"{STACK}.2.{name}.1.weight")
        whole = model.get_parameter(f"{STACK}.2.{name}.1.weight")
        assert kept.shape == (3 * D, D)
        assert torch.equal(kept, whole[: 3 * D])
        assert kept.data_ptr() == whole.data_ptr()
        bias = model.get_parameter(f"{STACK}.2.{name}.1.bias")
        assert torch.equal(view.get_parameter(f"{STACK}.2.{name}.1.bias"), bias[: 3 * D])
    assert not [name for name in view.state_dict() if name.startswith((f"{STACK}.2.img_mlp", f"{STACK}.2.txt_mlp"))]


def test_the_modulation_inside_a_norm_shrinks_too(traced: Traced) -> None:
    model, _, gm = traced["flux"]
    _, view, _ = edited(gm, 1)
    kept, whole = (m.get_parameter(f"{STACK}.1.norm1.linear.weight") for m in (view, model))
    assert torch.equal(kept, whole[: 3 * D])
    # With dual attention the feed-forward's third stands in the middle.
    model, _, gm = traced["sd3"]
    _, view, _ = edited(gm, 1)
    kept, whole = (m.get_parameter(f"{STACK}.1.norm1.linear.weight") for m in (view, model))
    assert torch.equal(kept, torch.cat([whole[: 3 * D], whole[6 * D :]]))


@pytest.mark.parametrize(
    ("name", "block", "streams"), [("qwen", 0, 2), ("qwen", 5, 2), ("flux", 3, 2), ("sd3", 0, 2), ("sd3", 7, 1)]
)
def test_the_count_is_arithmetic(traced: Traced, name: str, block: int, streams: int) -> None:
    model, kwargs, gm = traced[name]
    pluggable, view, edit = edited(gm, block)
    total = sum(p.numel() for p in model.parameters())
    assert parameter_count(view) == total - streams * SAVED
    assert sum(p.numel() for p in view.parameters()) == parameter_count(view)
    assert parameter_count(plugged(pluggable, frozenset())) == total
    assert len(switches(pluggable, edit)) == streams
    for given in (kwargs, models.other_kwargs(model)):
        assert view(**bind(view, given))[0].isfinite().all()


def test_it_is_inserted_once(traced: Traced) -> None:
    gm = copy_graph_module(traced["sd3"][2])
    Pipeline([Ffn(STACK, 4)], debug=True)(gm)
    assert not Pipeline([Ffn(STACK, 4)], debug=True)(gm).modified


@pytest.mark.parametrize(
    ("stack", "block", "words"),
    [
        ("single_transformer_blocks", 2, r"single_transformer_blocks\.2 has no feed-forward .*beside"),
        (STACK, 4, r"no block transformer_blocks\.4"),
    ],
)
def test_a_block_without_such_a_feed_forward_is_refused(traced: Traced, stack: str, block: int, words: str) -> None:
    gm = copy_graph_module(traced["flux"][2])
    before = [node.name for node in gm.graph.nodes]
    with pytest.raises(Refusal, match=words):
        Ffn(stack, block)(gm)
    assert [node.name for node in gm.graph.nodes] == before
