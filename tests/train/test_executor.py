"""The executor on a small graph: gradients where they belong, values freed, the sequential control."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from ppcl_fx.errors import GuardError
from ppcl_fx.tracing.guards import expect
from ppcl_fx.train.core.distiller import Distiller, edit_parameters, live_nodes
from ppcl_fx.train.core.losses import Weights, edit_loss, normalized_error, squared_error
from tests.train.graphs import EDITS, distillation_graph, inputs


def _gradients(gm: GraphModule) -> dict[str, Tensor]:
    return {name: p.grad for name, p in gm.named_parameters() if p.grad is not None}


def _by_hand(gm: GraphModule, x: Tensor, *, sequential: bool) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        middle = gm.t1(gm.t0(x))
        end = gm.t3(gm.t2(middle))
    first = gm.s0(x)
    second = gm.s1(first if sequential else middle)
    return normalized_error(first, middle), normalized_error(second, end) + squared_error(second, end)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_those_of_plain_autograd(sequential: bool, checkpointing: bool) -> None:
    gm, twin = distillation_graph(sequential=sequential), distillation_graph(sequential=sequential)
    losses = Distiller(gm, joint=sequential, checkpointing=checkpointing).step(inputs())
    by_hand = _by_hand(twin, inputs()["x"], sequential=sequential)
    sum(by_hand, start=torch.zeros(())).backward()
    assert list(losses) == list(EDITS)
    for found, expected in zip(losses.values(), by_hand, strict=True):
        torch.testing.assert_close(found, expected.detach())
        assert not found.requires_grad
    assert _gradients(gm).keys() == {
        "s0.linear.weight",
        "s0.linear.bias",
        "s1.linear.weight",
        "s1.linear.bias",
    }
    for name, gradient in _gradients(gm).items():
        torch.testing.assert_close(gradient, _gradients(twin)[name])


def test_each_interval_gets_its_own_loss_only() -> None:
    """Without the chain, the other interval's student may be anything: gradients are the same to the bit."""
    gm, other = distillation_graph(), distillation_graph()
    torch.nn.init.normal_(other.get_parameter("s1.linear.weight"), generator=torch.Generator().manual_seed(9))
    for graph in (gm, other):
        Distiller(graph).step(inputs())
    assert torch.equal(_gradients(gm)["s0.linear.weight"], _gradients(other)["s0.linear.weight"])


def test_in_the_chain_the_later_loss_reaches_the_earlier_student() -> None:
    gm, other = distillation_graph(sequential=True), distillation_graph(sequential=True)
    torch.nn.init.normal_(other.get_parameter("s1.linear.weight"), generator=torch.Generator().manual_seed(9))
    for graph in (gm, other):
        Distiller(graph, joint=True).step(inputs())
    assert not torch.equal(_gradients(gm)["s0.linear.weight"], _gradients(other)["s0.linear.weight"])


def test_gradients_add_up_over_steps() -> None:
    gm = distillation_graph()
    distiller = Distiller(gm)
    distiller.step(inputs())
    once = {name: gradient.clone() for name, gradient in _gradients(gm).items()}
    distiller.step(inputs())
    for name, gradient in _gradients(gm).items():
        torch.testing.assert_close(gradient, 2 * once[name])


def test_a_students_values_are_freed_before_the_next_student_runs() -> None:
    gm = distillation_graph()
    first: list[weakref.ref[Tensor]] = []
    alive_later: list[bool] = []

    def remember(_module: Any, _args: Any, output: Tensor) -> None:
        first.append(weakref.ref(output))

    def look(_module: Any, _args: Any) -> None:
        gc.collect()
        alive_later.append(first[0]() is not None)

    gm.get_submodule("s0").register_forward_hook(remember)
    gm.get_submodule("s1").register_forward_pre_hook(look)
    Distiller(gm).step(inputs())
    assert alive_later == [False]


def test_the_teacher_runs_without_gradients_and_the_mode_is_restored() -> None:
    gm = distillation_graph()
    modes: dict[str, bool] = {}
    for name in ("t0", "s0", "t3", "s1"):
        gm.get_submodule(name).register_forward_pre_hook(
            lambda *_, name=name: modes.__setitem__(name, torch.is_grad_enabled())
        )
    with torch.no_grad():
        Distiller(gm).step(inputs())
        assert not torch.is_grad_enabled()
    assert modes == {"t0": False, "s0": True, "t3": False, "s1": True}
    assert [node.name for node in gm.graph.nodes if node in live_nodes(gm)][:2] == ["s0", "pairs"]


def test_parameters_belong_to_their_edit() -> None:
    for sequential in (False, True):
        gm = distillation_graph(sequential=sequential)
        groups = edit_parameters(gm)
        assert list(groups) == list(EDITS)
        for i, parameters in enumerate(groups.values()):
            expected = list(gm.get_submodule(f"s{i}").parameters())
            assert len(parameters) == 2
            assert all(a is b for a, b in zip(parameters, expected, strict=True))


def test_frozen_students_are_refused() -> None:
    gm = distillation_graph()
    gm.get_submodule("s1").requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"nothing to train: depth:blocks\.2-3"):
        Distiller(gm)


def test_parameters_that_train_for_nothing_are_refused() -> None:
    gm = distillation_graph()
    gm.get_submodule("t3").requires_grad_(True)
    gm.graph.output_node().args = ((gm.graph.output_node().args[0][0],),)
    for node in reversed(gm.graph.nodes):
        if node.name == "pairs_1":
            gm.graph.erase_node(node)
    with pytest.raises(RuntimeError, match="train for no edit: t3"):
        Distiller(gm)


def test_weights_reach_the_loss() -> None:
    gm = distillation_graph()
    losses = Distiller(gm, Weights(image=0.0, linear=2.0), joint=False)
    with pytest.raises(RuntimeError, match="no loss term"):
        losses.step(inputs())
    found = Distiller(gm, Weights(linear=0.0)).step(inputs())
    with torch.no_grad():
        x = inputs()["x"]
        middle = gm.t1(gm.t0(x))
        expected = edit_loss([("image", gm.s1(middle), gm.t3(gm.t2(middle)))], Weights())
    torch.testing.assert_close(found[EDITS[1]], expected)


def test_autocast_computes_in_bf16_and_keeps_float32_gradients() -> None:
    gm = distillation_graph()
    dtypes: list[torch.dtype] = []
    gm.get_submodule("s0.linear").register_forward_hook(lambda _m, _a, out: dtypes.append(out.dtype))
    losses = Distiller(gm, autocast=torch.bfloat16).step(inputs())
    assert dtypes == [torch.bfloat16]
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    exact = Distiller(distillation_graph()).step(inputs())
    for edit, loss in losses.items():
        torch.testing.assert_close(loss, exact[edit], rtol=0.05, atol=0.05)
    assert {gradient.dtype for gradient in _gradients(gm).values()} == {torch.float32}


def test_a_call_outside_of_the_trace_is_refused() -> None:
    with pytest.raises(GuardError, match="'y'"):
        Distiller(distillation_graph()).step({**inputs(), "y": torch.ones(1)})


def test_an_error_inside_of_the_graph_stays_one_line() -> None:
    gm = distillation_graph()
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.call_function(expect, (1, 2, "the answer"))
    with pytest.raises(GuardError, match="the answer was 2") as caught:
        Distiller(gm).step(inputs())
    assert "\n" not in str(caught.value)
