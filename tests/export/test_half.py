"""Half precision: the float32 islands of the file, its check on widened types, and the range of float16."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from ppcl_fx.calls.examples import floats_as
from ppcl_fx.calls.store import Call, Calls
from ppcl_fx.errors import PpclError
from ppcl_fx.export import ExportConfig, export_graph, lower
from ppcl_fx.export.onnx import half
from ppcl_fx.export.onnx.graph_run import run_graph
from ppcl_fx.export.onnx.half import check_range, largest_values
from ppcl_fx.export.onnx.writer import call_of, in_type
from ppcl_fx.export.store.manifest import Manifest
from ppcl_fx.export.verify.twin import widen
from ppcl_fx.io.files import read_json
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.model.retrace import with_weights
from ppcl_fx.passes.contract import Pass, Pipeline, Result
from ppcl_fx.passes.lowering.lowering import ClampHalf
from ppcl_fx.schema.plan import Plan
from ppcl_fx.tracing import trace
from tests import models
from tests.coverage.table import CASES
from tests.export.operators import fused_operators
from tests.export.test_runtime_families import qwen, run_of

pytestmark = pytest.mark.slow

FLOAT = ir.DataType.FLOAT
HALF = {torch.bfloat16: ir.DataType.BFLOAT16, torch.float16: ir.DataType.FLOAT16}


def calls_of(kwargs: dict[str, Any]) -> Calls:
    return Calls([Call(kwargs=kwargs, prompts=("a", "b"), timestep=0.5, index=0, batch=2)])


def typed(model: nn.Module, calls: Calls, dtype: torch.dtype) -> tuple[GraphModule, dict[str, Any]]:
    """A model's graph as it is exported in a type, with a call for it."""
    gm = trace(model, calls[0].kwargs)
    fresh = in_type(gm, Plan(), dtype, calls)
    assert fresh is not None and in_type(fresh, Plan(), dtype, calls) is None
    made = with_weights(fresh, gm)
    return made, call_of(made, calls)[0]


@pytest.fixture(scope="module", params=HALF, ids=str)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.dtype, Any]:
    """A small Qwen-Image in each type of half precision."""
    teacher, kwargs = models.tiny_qwen(blocks=2)
    path = tmp_path_factory.mktemp("half") / "two.onnx"
    config = ExportConfig(dtype=request.param, runs=1)
    done = export_graph(trace(teacher, kwargs), path, config, calls=calls_of(kwargs), sampling=run_of(qwen))
    return request.param, done


def test_recorded_calls_and_a_run_are_compared_widened(written: tuple[torch.dtype, Any]) -> None:
    gate = written[1].gate
    assert gate.not_checked == [] and gate.calls.compared == 1 and gate.sampling.transformer_calls == 4
    assert 0 < gate.calls.relative < 1e-5 and 0 < gate.sampling.relative < 1e-4


def test_weights_and_inputs_are_half_and_tables_and_timesteps_are_not(written: tuple[torch.dtype, Any]) -> None:
    dtype, done = written
    model = ir.load(done.onnx)
    assert {value.name: value.dtype for value in model.graph.inputs} == {
        "hidden_states": HALF[dtype], "encoder_hidden_states": HALF[dtype], "timestep": FLOAT,
        "image_rotary": FLOAT, "text_rotary": FLOAT,
    }  # fmt: skip
    assert model.graph.outputs[0].dtype == HALF[dtype]
    weights = {v.dtype for n, v in model.graph.initializers.items() if "/" not in n}
    assert weights == {HALF[dtype]}


def test_float32_islands_stay(written: tuple[torch.dtype, Any]) -> None:
    dtype, done = written
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.load(str(done.onnx))))
    by_type: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        by_type.setdefault(node.op_type, []).append(node)
    # The sinusoid of the timestep and the rotations are float32; the norms add up in float32.
    for kind in ("Sin", "Cos", "RotaryEmbedding"):
        assert by_type[kind] and all(node.outputs[0].dtype == FLOAT for node in by_type[kind])
    for kind in ("RMSNormalization", "LayerNormalization"):
        assert by_type[kind] and all(node.attributes["stash_type"].value == FLOAT for node in by_type[kind])
    assert all(node.inputs[0].dtype == HALF[dtype] for node in by_type["Attention"])
    assert fused_operators(model) == {"Attention": 2, "RMSNormalization": 9, "RotaryEmbedding": 8}


def test_only_float16_is_clamped_where_it_leaves_a_block(written: tuple[torch.dtype, Any]) -> None:
    dtype, done = written
    clips = [node for node in ir.load(done.onnx).graph if node.op_type == "Clip"]
    # Both streams of the first block, the image of the second: its text goes nowhere.
    assert len(clips) == (3 if dtype == torch.float16 else 0)


def test_file_is_compared_on_widened_types_to_the_accuracy_of_float32(written: tuple[torch.dtype, Any]) -> None:
    dtype, done = written
    assert 0 < done.parity_max_abs < 1e-5
    assert done.latency_ms is None and done.unchecked is None
    card = read_json(done.onnx.with_suffix(".json"), Manifest)
    assert card.dtype == str(dtype).removeprefix("torch.")
    assert card.half is not None and card.half.compared_in == "float32"
    assert 0 < card.half.rounding < {torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    largest = card.half.largest_value
    assert largest is None if dtype == torch.bfloat16 else largest is not None and 0 < largest < 32752
    assert sorted(p.name for p in done.onnx.parent.iterdir()) == ["two.json", "two.onnx"]


def test_widened_model_holds_no_half(written: tuple[torch.dtype, Any]) -> None:
    model = ir.load(written[1].onnx)
    widen(model)
    left = [v for n in model.graph for v in n.outputs if v.dtype in HALF.values()]
    left += [v for v in (*model.graph.inputs, *model.graph.initializers.values()) if v.dtype in HALF.values()]
    assert left == []
    assert not any(n.attributes["to"].value in HALF.values() for n in model.graph if n.op_type == "Cast")


def test_float16_without_calls_is_refused(tmp_path: Path) -> None:
    teacher, kwargs = models.tiny_qwen(blocks=2)
    with pytest.raises(PpclError, match="fp16: whether it holds the model is shown on recorded calls; give --calls"):
        export_graph(trace(teacher, kwargs), tmp_path / "out" / "two.onnx", ExportConfig(dtype="fp16"))
    assert not list(tmp_path.rglob("*.*"))


def test_a_value_near_the_end_of_fp16_refuses_the_model_and_names_it(tmp_path: Path) -> None:
    teacher, kwargs = models.tiny_qwen(blocks=2)
    with torch.no_grad():
        teacher.transformer_blocks[1].img_mlp.net[0].proj.weight.mul_(1e5)
    gm = trace(teacher, kwargs)
    named = r"fp16 does not hold this model: transformer_blocks\.1\S* reaches .* --dtype bf16"
    with pytest.raises(PpclError, match=named):
        export_graph(gm, tmp_path / "two.onnx", ExportConfig(dtype="fp16"), calls=calls_of(kwargs))
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("build", [models.tiny_qwen, models.tiny_flux, models.tiny_sd3])
def test_clamping_changes_nothing_but_what_overflows(build: Any) -> None:
    teacher, kwargs = build()
    gm, call = typed(teacher, calls_of(kwargs), torch.float16)
    lowered = lower(gm)
    clamps = [node for node in lowered.graph.graph.nodes if node.target is torch.clamp]
    assert len(clamps) >= len(teacher.transformer_blocks)
    assert not ClampHalf()(lowered.graph).modified
    with torch.no_grad():
        expected = gm(**call)[0]
        assert torch.equal(run_graph(lowered.graph, lowered.feeds(call))[0], expected)


def test_what_overflows_at_the_end_of_a_block_stays_a_number() -> None:
    teacher, kwargs = models.tiny_flux()  # whose class clamps the text alone
    first = teacher.transformer_blocks[0]
    with torch.no_grad():
        first.norm1.linear.bias.fill_(4.0)
        first.ff.net[2].bias.fill_(6e4)  # times its gate, about 4
        gm, call = typed(teacher, calls_of(kwargs), torch.float16)
        lowered = lower(gm)
        assert gm(**call)[0].isnan().any()
        assert run_graph(lowered.graph, lowered.feeds(call))[0].isfinite().all()


def test_timesteps_are_as_wide_as_the_pipeline_passes_them() -> None:
    teacher, kwargs = models.tiny_sd3()
    times = torch.tensor([987.65, 12.34])
    call = floats_as(kwargs | {"timestep": times}, torch.bfloat16)
    assert torch.equal(call["timestep"], times) and call["hidden_states"].dtype == torch.bfloat16
    gm, example = typed(teacher, calls_of(kwargs | {"timestep": times}), torch.bfloat16)
    assert example["timestep"].dtype == torch.float32
    with torch.no_grad():
        expected = teacher.bfloat16()(**call)[0]
        assert torch.equal(gm(**example)[0], expected)
        # SD3 makes its sinusoid of what it is given.
        assert not torch.equal(gm(**example | {"timestep": times.bfloat16()})[0], expected)
    # What came in half precision is widened where that is wanted, and never goes from one half to the other.
    for dtype in (torch.float16, torch.float32):
        assert floats_as({"t": times.bfloat16()}, dtype)["t"].dtype == torch.float32
    assert floats_as({"t": times.bfloat16()}, torch.bfloat16)["t"].dtype == torch.bfloat16


@pytest.mark.parametrize("count", [1, 7, 8, 15, 17])
def test_at_most_eight_calls_are_looked_at_evenly_spread(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gm = torch.fx.symbolic_trace(_Grows(1.0))
    next(iter(gm.graph.nodes)).meta["val"] = torch.zeros(1, 4)
    seen: list[int] = []
    monkeypatch.setattr(half, "bind", lambda graph, kwargs: kwargs)
    monkeypatch.setattr(half, "check_range", lambda graph, calls: seen.extend(int(c["x"][0, 0]) for c in calls))
    calls = [Call(kwargs={"x": torch.full((1, 4), i)}, prompts=("a",), timestep=0.5, index=i, batch=1) for i in
             range(count)]  # fmt: skip
    half.largest_value(gm, Calls(calls), None)
    assert len(seen) == min(8, count) and seen[0] == 0
    gaps = {after - before for before, after in itertools.pairwise(seen)}
    assert gaps <= {count // 8 or 1, count // 8 + 1}


class _Grows(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False).half()
        self.second = nn.Linear(4, 4, bias=False).half()
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(4))
            self.second.weight.copy_(factor * torch.eye(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)).float() * 1e6


@pytest.mark.parametrize(("factor", "refused"), [(3e4, False), (3.5e4, True), (6.5e4, True)])
def test_the_margin_is_two(factor: float, refused: bool) -> None:
    gm = torch.fx.symbolic_trace(_Grows(factor))
    calls = [{"x": torch.full((2, 4), 0.5).half()}, {"x": torch.ones(2, 4).half()}]
    found = largest_values(gm, calls)
    assert found["first"] == 1.0
    assert found["second"] == pytest.approx(factor, rel=1e-3)
    assert "mul" not in found  # float32, whatever it holds
    if refused:
        with pytest.raises(PpclError, match="second reaches"):
            check_range(gm, calls)
    else:
        assert check_range(gm, calls) == found["second"]


def test_what_overflows_counts_and_what_was_infinite_before_does_not() -> None:
    calls = [{"x": torch.full((1, 4), 2.0).half()}]
    with pytest.raises(PpclError, match="second reaches inf"):
        check_range(torch.fx.symbolic_trace(_Grows(6.5e4)), calls)

    def masked(x: torch.Tensor) -> torch.Tensor:
        return (x + torch.full((4,), float("-inf"), dtype=torch.float16)).unsqueeze(0)

    assert check_range(torch.fx.symbolic_trace(masked), calls) == 0.0


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_cast_that_the_trace_wrote_down_is_of_the_type_of_the_export(dtype: torch.dtype) -> None:
    """AuraFlow's trace in float32 casts its timestep to float32, which does not go together with other weights."""
    case = next(case for case in CASES if case.id == "AuraFlowTransformer2DModel")
    model, kwargs = case.build(), case.kwargs()
    gm, call = typed(model, calls_of(kwargs), dtype)
    assert {p.dtype for p in gm.parameters()} == {dtype} and {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(gm(**call)[0], model.to(dtype)(**call, return_dict=False)[0])


def test_parts_that_a_class_keeps_in_float32_stay_so() -> None:
    case = next(case for case in CASES if case.id == "WanTransformer3DModel")
    model, kwargs = case.build(), case.kwargs()
    gm, _ = typed(model, calls_of(kwargs), torch.bfloat16)
    kept = {name for name, p in gm.named_parameters() if p.dtype == torch.float32}
    assert "condition_embedder.time_embedder.linear_1.weight" in kept
    assert all(set(name.split(".")) & set(model._keep_in_fp32_modules) for name in kept)


class _Changed(Pass, name="test-half-changed", kind="rewrite", numerics="approximate"):
    """Says that it changed a graph."""

    def apply(self, gm: GraphModule) -> Result:
        return Result(gm, True)


def test_a_graph_that_its_class_does_not_give_is_one_line(tmp_path: Path) -> None:
    teacher, kwargs = models.tiny_qwen(blocks=2)
    config, calls = ExportConfig(dtype="bf16", overwrite=True), calls_of(kwargs)

    def refused(gm: GraphModule, match: str) -> None:
        with pytest.raises(PpclError, match=match) as caught:
            export_graph(gm, tmp_path / "two.onnx", config, calls=calls)
        assert "\n" not in str(caught.value)

    gm = trace(teacher, kwargs)
    graph_info(gm)["config"]["_class_name"] = "Home"
    refused(gm, "traced from no class of diffusers, .* bfloat16 .*leave --dtype out")
    gm = trace(teacher, kwargs)
    Pipeline([_Changed()])(gm)
    refused(gm, r"not what is traced from QwenImageTransformer2DModel \(its passes are test-half-changed\)")
    gm = trace(teacher, kwargs)
    gm.set_submodule("proj_out", nn.Linear(32, 7))
    refused(gm, r"\(its parameter proj_out.weight is another\).* trace it again")
    assert list(tmp_path.iterdir()) == []


def test_memory_that_nobody_has_written_to_holds_no_value() -> None:
    def rotated(x: torch.Tensor) -> torch.Tensor:
        made = torch.empty_like(x)  # as Wan does it
        made[..., 0::2] = 2 * x[..., 0::2]
        made[..., 1::2] = -x[..., 1::2]
        return made

    graph = torch.fx.Graph()
    graph.output(graph.call_function(rotated, (graph.placeholder("x"),)))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills such memory with NaN
    try:
        found = largest_values(GraphModule(nn.Module(), graph), [{"x": torch.full((1, 4), 2.0).half()}])
    finally:
        torch.use_deterministic_algorithms(before)
    assert max(found.values()) == 4.0
