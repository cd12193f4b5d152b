"""Tracing: bit-equal to the model, inside of what the guards allow, and an error everywhere else."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from ppcl_fx.errors import GuardError, PpclError
from ppcl_fx.ir.graphs import module_paths, normal_path, parameter_count
from ppcl_fx.tracing import bind, trace
from ppcl_fx.tracing.examples import to_meta
from ppcl_fx.tracing.guards import guards
from tests import models, toys
from tests.coverage.table import CASES

BUILD = {"qwen": models.tiny_qwen, "flux": models.tiny_flux, "sd3": models.tiny_sd3}
Case = tuple[Any, dict[str, Any], GraphModule]


@pytest.fixture(scope="module", params=list(BUILD))
def case(request: pytest.FixtureRequest) -> Case:
    model, kwargs = BUILD[request.param]()
    return model, kwargs, trace(model, kwargs)


@pytest.fixture(scope="module")
def qwen() -> Case:
    model, kwargs = models.tiny_qwen(blocks=2)
    return model, kwargs, trace(model, kwargs)


def run(gm: GraphModule, kwargs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        result = gm(**bind(gm, kwargs))[0]
    assert isinstance(result, torch.Tensor)
    return result


def test_a_trace_is_bit_equal_on_the_example_and_on_other_shapes(case: Case) -> None:
    model, kwargs, gm = case
    for given in (kwargs, models.other_kwargs(model)):
        with torch.no_grad():
            assert torch.equal(run(gm, given), model(**given)[0])


def test_a_trace_shares_every_parameter_and_keeps_their_names(case: Case) -> None:
    model, _, gm = case
    mine = dict(gm.named_parameters())
    assert mine.keys() == dict(model.named_parameters()).keys()
    assert all(mine[name] is parameter for name, parameter in model.named_parameters())
    assert set(gm.state_dict()) == set(model.state_dict())
    assert parameter_count(gm) == sum(p.numel() for p in model.parameters())


def test_blocks_are_looked_into_and_their_modules_stay_whole(case: Case) -> None:
    _, _, gm = case
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    assert not called & set(gm.meta["ppcl"]["blocks"])
    assert "transformer_blocks.1.attn" in called
    inside = [node for node in gm.graph.nodes if "transformer_blocks.1" in module_paths(node)]
    assert len(inside) > 5
    assert all("val" in node.meta for node in inside)


def test_a_deep_copy_of_a_trace_runs_alone(case: Case) -> None:
    model, kwargs, gm = case
    copied = copy.deepcopy(gm)
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in model.parameters()}
    assert torch.equal(run(copied, kwargs), run(gm, kwargs))


def test_the_meta_device_gives_the_same_graph(case: Case) -> None:
    model, kwargs, gm = case
    on_meta = trace(copy.deepcopy(model).to("meta"), to_meta(kwargs))
    assert [n.format_node() for n in on_meta.graph.nodes] == [n.format_node() for n in gm.graph.nodes]
    assert all(parameter.is_meta for parameter in on_meta.parameters())


def test_tracing_leaves_the_model_and_torch_as_they_were() -> None:
    model, kwargs = models.tiny_sd3()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {name: {key: id(value) for key, value in vars(m).items()} for name, m in model.named_modules()}
    patched = (nn.Module.__call__, nn.Module.__getattr__, torch.zeros, torch.arange, torch.tensor)
    trace(model, kwargs)
    after = {name: {key: id(value) for key, value in vars(m).items()} for name, m in model.named_modules()}
    assert after == attributes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert patched == (nn.Module.__call__, nn.Module.__getattr__, torch.zeros, torch.arange, torch.tensor)
    own = vars(sys.modules[type(model).__module__])
    assert "len" not in own
    assert "int" not in own


def test_torch_is_put_back_when_a_trace_fails() -> None:
    before = (nn.Module.__call__, nn.Module.__getattr__, torch.zeros)
    with pytest.raises(PpclError, match="values of a tensor.*the input 'x' has none; trace with actual inputs"):
        trace(toys.build(toys.BranchesOnValues), to_meta(toys.example()))
    assert before == (nn.Module.__call__, nn.Module.__getattr__, torch.zeros)


def test_another_number_of_dimensions_is_refused(qwen: Case) -> None:
    _, kwargs, gm = qwen
    with pytest.raises(GuardError, match="the input 'hidden_states' was a tensor with 3 dimensions.* 4 dimensions now"):
        run(gm, {**kwargs, "hidden_states": kwargs["hidden_states"][None]})


def test_a_list_of_another_length_is_refused_with_file_and_line() -> None:
    model = toys.build(toys.WalksAList)
    given = {**toys.example(), "factors": [2.0, 3.0]}
    gm = trace(model, given)
    for factors in ([2.0, 3.0], [0.5, -1.0]):
        with torch.no_grad():
            expected = model(**{**given, "factors": factors}, return_dict=False)[0]
            assert torch.equal(run(gm, {**given, "factors": factors}), expected)
    for factors in ([2.0], [2.0, 3.0, 4.0]):
        with pytest.raises(GuardError, match=r"length of factors at toys\.py:\d+ was 2 while tracing and is \d"):
            run(gm, {**given, "factors": factors})
    with pytest.raises(GuardError, match=r"bool\(factors\) at toys\.py:\d+ was True while tracing and is False now"):
        run(gm, {**given, "factors": []})


def test_a_list_that_only_a_whole_module_reads_may_have_another_length(qwen: Case) -> None:
    model, kwargs, gm = qwen
    two_pictures = {
        **kwargs,
        "hidden_states": torch.cat([kwargs["hidden_states"]] * 2, dim=1),
        "img_shapes": [[(1, 4, 4), (1, 4, 4)]] * 2,
    }
    with torch.no_grad():
        assert torch.equal(run(gm, two_pictures), model(**two_pictures)[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"guidance": torch.ones(2)}, "the argument 'guidance' was 'not given' while tracing"),
        ({"attention_kwargs": {"scale": 0.5}}, "the argument 'attention_kwargs' was {} while tracing"),
        ({"nonsense": 1}, "the argument 'nonsense' was 'not given' while tracing"),
        ({"timestep": None}, "the argument 'timestep' was given while tracing and is missing now"),
    ],
)
def test_other_arguments_than_the_traced_ones_are_refused(qwen: Case, change: dict[str, Any], words: str) -> None:
    _, kwargs, gm = qwen
    with pytest.raises(GuardError, match=words):
        run(gm, {**kwargs, **change})


def test_a_mask_that_was_not_traced_is_refused_and_one_that_was_is_followed() -> None:
    model, plain = models.tiny_qwen(blocks=2)
    masked = models.qwen_kwargs(mask=True)
    with pytest.raises(GuardError, match="'encoder_hidden_states_mask' was 'not given'"):
        bind(trace(model, plain), masked)
    gm = trace(model, masked)
    for given in (masked, models.qwen_kwargs(batch=3, height=6, text=7, mask=True, seed=5)):
        with torch.no_grad():
            assert torch.equal(run(gm, given), model(**given)[0])


@pytest.mark.parametrize("kind", [toys.CountsTheBatch, toys.WalksTheBatch, toys.CutsTheBatch])
def test_a_model_that_loops_over_the_batch_raises_on_another_batch(kind: type[toys.Toy]) -> None:
    model = toys.build(kind)
    gm = trace(model, toys.example(batch=2))
    # Another text length is inside of what was traced.
    for given in (toys.example(batch=2), toys.example(batch=2, tokens=9)):
        with torch.no_grad():
            assert torch.equal(run(gm, given), model(**given, return_dict=False)[0])
    for batch in (1, 3, 5):
        with pytest.raises(GuardError, match=r"toys\.py:\d+.*trace the model again"):
            run(gm, toys.example(batch=batch))


def test_a_decision_on_a_size_is_guarded() -> None:
    model = toys.build(toys.BranchesOnLength)
    gm = trace(model, toys.example(tokens=6))
    assert any(r"toys.py:" in str(guard.args[2]) for guard in guards(gm))
    with torch.no_grad():
        assert torch.equal(run(gm, toys.example(tokens=9)), model(**toys.example(tokens=9))["sample"])
    with pytest.raises(GuardError, match=r"bool\(\w+\) at toys\.py:\d+ was True while tracing and is False now"):
        run(gm, toys.example(tokens=3))


def test_a_decision_by_values_holds_for_calls_that_decide_alike() -> None:
    model = toys.build(toys.BranchesOnValues)
    example = {"x": torch.ones(2, 6, toys.WIDTH)}
    gm = trace(model, example)
    with torch.no_grad():
        for scale in (1, 3):
            given = {"x": scale * example["x"]}
            assert torch.equal(run(gm, given), model(**given, return_dict=False)[0])
    with pytest.raises(GuardError, match=r"toys\.py:\d+ was True while tracing and is False now"):
        run(gm, {"x": -example["x"]})


def test_lengths_read_from_a_mask_are_guarded() -> None:
    model = toys.build(toys.ReadsLengths)
    for traced in ((6, 6), (6, 4)):
        gm = trace(model, toys.masked(*traced))
        outside = 0
        # A call outside of what was traced raises; it never answers with something else.
        for lengths in ((6, 6), (6, 4), (5, 5), (5, 3), (4, 6), (6,), (6, 6, 6)):
            given = toys.masked(*lengths)
            try:
                with torch.no_grad():
                    assert torch.equal(run(gm, given), model(**given, return_dict=False)[0])
            except GuardError:
                outside += 1
        assert 2 <= outside < 7
        with pytest.raises(PpclError, match=r"the input 'mask' has none; trace with actual inputs"):
            trace(model, to_meta(toys.masked(*traced)))


@pytest.mark.parametrize("kind", [toys.AsksItsDevice, toys.LeavesAutocast, toys.HasAWholePart])
def test_a_model_that_asks_where_it_runs_is_traced_for_that_place(kind: type[toys.Toy]) -> None:
    model = toys.build(kind)
    gm = trace(model, toys.example())
    for given in (toys.example(), toys.example(batch=3, tokens=4)):
        with torch.no_grad():
            assert torch.equal(run(gm, given), model(**given, return_dict=False)[0])


def test_a_part_outside_of_autocast_refuses_autocast() -> None:
    model = toys.build(toys.LeavesAutocast)
    gm = trace(model, toys.example())
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(GuardError, match=r"autocast at toys\.py:\d+ was False while tracing and is True now"),
    ):
        run(gm, toys.example())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(PpclError, match="trace outside of autocast"):
        trace(model, toys.example())


@pytest.mark.parametrize(
    ("kind", "words"),
    [(toys.EntersAutocast, "switches autocast on"), (toys.MapsTokens, "maps a function over proxies by torch.vmap")],
)
def test_what_a_trace_cannot_keep_is_refused_with_its_place(kind: type[toys.Toy], words: str) -> None:
    with pytest.raises(PpclError, match=rf"toys\.py:\d+.* {words}"):
        trace(toys.build(kind), toys.example())


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(PpclError, match="Sequential has no transformer blocks"):
        trace(nn.Sequential(nn.Linear(3, 3)), {"input": torch.zeros(1, 3)})


@pytest.mark.parametrize(("path", "words"), [("", "the model"), ("transformer_blocks.1", "'transformer_blocks.1'")])
def test_hooks_are_refused(path: str, words: str) -> None:
    model, kwargs = models.tiny_qwen(blocks=2)
    model.get_submodule(path).register_forward_hook(lambda module, args, result: None)
    with pytest.raises(PpclError, match=f"{words} has forward hooks"):
        trace(model, kwargs)


@pytest.mark.filterwarnings("ignore")
def test_a_trace_leaves_torch_compile_as_it_was() -> None:
    """Flex attention compiles itself in the middle of a trace, while torch's constructors are patched."""
    torch._dynamo.trace_rules.clear_lru_cache()
    case = next(case for case in CASES if case.name == "AnyFlowFARTransformer3DModel")
    trace(case.build(), case.kwargs())
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + torch.arange(3), backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(3)), torch.tensor([1.0, 2.0, 3.0]))


def test_a_misspelt_argument_is_named_with_its_neighbour() -> None:
    model, kwargs = models.tiny_qwen(blocks=2)
    with pytest.raises(PpclError, match=r"no argument 'img_shape' \(did you mean 'img_shapes'\?\)"):
        trace(model, {**kwargs, "img_shape": kwargs["img_shapes"]})


def test_module_paths_read_the_same_from_every_front_end() -> None:
    assert normal_path("transformer_blocks.0.attn") == "transformer_blocks.0.attn"
    dynamo = "L['self'].__dict__['_modules']['transformer_blocks'].0.attn"
    assert normal_path(dynamo) == "transformer_blocks.0.attn"
    assert normal_path("L['self']._modules['transformer_blocks']._modules['3']") == "transformer_blocks.3"
